"""Which phases become one job, and the text of its batch script."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.slurm.chain import Site, make_scripts
from hvd_batchgrow.slurm.chain_jobs import make_chain_jobs, on_whole_nodes, with_ranks_per_phase
from hvd_batchgrow.slurm.render import (
    ARGUMENTS,
    directive,
    dry_commands,
    extra_options,
    log_pattern,
    overriding_variables,
    render,
)
from hvd_batchgrow.train.run.notes import notes_on_ranks
from hvd_batchgrow.train.run.phase_range import check_width
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
from tests.helpers import NUM_TRAIN, measured_job, small_job
from tests.lone_rank import LoneRank

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "slurm" / "train.sbatch").read_text()
GOLDEN = Path(__file__).parent / "golden"


def plan_of(ranks: list[int], **sections: dict[str, Any]) -> Plan:
    """The small job's four phases, of 2, 6, 12 and 12 ghost batches."""
    layout = {"grow_by": "ranks", "ranks_per_phase": ranks, "uneven_ranks": True}
    return compile_plan(small_job(layout=layout, **sections), max(ranks), NUM_TRAIN)


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "expected"),
    [
        # phases, nodes, ranks per node
        ([1, 2, 4, 4], 1, [("1-1", 1, 1), ("2-2", 2, 1), ("3-4", 4, 1)]),
        ([2, 2, 2, 2], 1, [("1-4", 2, 1)]),
        ([2, 6, 6, 12], 2, [("1-1", 1, 2), ("2-3", 3, 2), ("4-4", 6, 2)]),
        # One node may be filled in part.
        ([1, 2, 4, 8], 4, [("1-1", 1, 1), ("2-2", 1, 2), ("3-3", 1, 4), ("4-4", 2, 4)]),
        # A phase with fewer ranks gets its own job too.
        ([2, 4, 2, 2], 1, [("1-1", 2, 1), ("2-2", 4, 1), ("3-4", 2, 1)]),
    ],
)
def test_phases_of_equal_width_are_one_link(
    ranks: list[int], ranks_per_node: int, expected: list[tuple[str, int, int]]
) -> None:
    plan = plan_of(ranks)
    links = make_chain_jobs(plan, 12, ranks_per_node)
    assert [(link.phases, link.nodes, link.ranks_per_node) for link in links] == expected
    assert links[0].start_samples == 0
    assert [link.end_samples for link in links[:-1]] == [link.start_samples for link in links[1:]]
    assert links[-1].end_samples == plan.schedule.end_samples
    assert sum(link.num_updates for link in links) == plan.num_updates


def test_phases_that_a_trigger_makes_as_it_goes_are_no_links() -> None:
    plan = compile_plan(measured_job({"name": "plateau", "patience_epochs": 1.0}), 1, NUM_TRAIN)
    remedy = "as one job: sbatch --nodes=N --ntasks-per-node=R .*train.sbatch JOB --resume auto"
    with pytest.raises(JobError, match=f"'adaptive' determines its phases during training; {remedy}"):
        make_chain_jobs(plan, 4, 1)
    with pytest.raises(JobError, match="--phases: a trigger decides the phases during the run"):
        check_width(plan, (1, 1), 1)


def test_a_phase_without_updates_makes_no_link() -> None:
    # 300 samples: the update of 48 from sample 160 ends at 208, beyond the second boundary at 0.6 epochs = 180.
    schedule = {"boundaries_epochs": [0.5, 0.55, 0.6], "noise_factor": 3.0}
    plan = plan_of([1, 2, 4, 4], schedule=schedule)
    assert [phase.num_updates > 0 for phase in plan.schedule.phases] == [True, True, False, True]
    assert [(link.phases, link.ranks) for link in make_chain_jobs(plan, 4, 1)] == [("1-1", 1), ("2-3", 2), ("4-4", 4)]


@pytest.mark.parametrize(
    ("ranks", "nodes_max", "ranks_per_node", "message"),
    [
        # 6 = 1.5 · 4; phase 2 has only 6 ghost batches; 8 ranks do not fit on nodes of 3, and need 4 of 2
        (
            [1, 6, 8, 8], 4, 4,
            "phase 2 (from epoch 0.5): 6 ranks = 1.50 nodes of 4; nearest: 4 ranks (layout.ranks_per_phase), "
            "or --ranks-per-node 2\n",
        ),
        # 8 ranks would need 4 nodes of 2
        ([1, 6, 8, 8], 3, 4, "6 ranks = 1.50 nodes of 4; nearest: 4 ranks (layout.ranks_per_phase)\n"),
        ([2, 2, 6, 12], 4, 4, "6 ranks = 1.50 nodes of 4; nearest: 4, 8 ranks (layout.ranks_per_phase), or --ranks-p"),
        (
            [1, 2, 4, 4], 3, 1,
            "phase 3 (from epoch 1): 4 ranks = 4 nodes of 1, and --nodes-max is 3; "
            "nearest: 3 ranks (layout.ranks_per_phase), or --nodes-max 4",
        ),
        # --nodes-max 3 would not help the 6 ranks
        ([1, 6, 12, 1], 2, 4, "12 ranks = 3 nodes of 4, and --nodes-max is 2; nearest: 8 ranks (layout.ranks_per_ph"),
    ],
)  # fmt: skip
def test_a_fraction_of_a_node_is_refused_with_the_nearest(
    ranks: list[int], nodes_max: int, ranks_per_node: int, message: str
) -> None:
    with pytest.raises(JobError) as caught:
        make_chain_jobs(plan_of(ranks), nodes_max, ranks_per_node)
    assert message in f"{caught.value}\n"


def test_the_example_of_the_documentation_is_refused_with_numbers_that_form_the_batch() -> None:
    """Batches of 32, 96 and 96 samples: 4, 12 and 12 ghost batches, where those of docs/slurm.md have 4, 12 and 36."""
    schedule = {"global_batch": 32, "boundaries_epochs": [0.5, 1.0]}
    layout = {"grow_by": "ranks", "ranks_per_phase": [4, 6, 12]}
    plan = compile_plan(small_job(schedule=schedule, layout=layout), 12, NUM_TRAIN)
    with pytest.raises(JobError, match=r"6 ranks = 1.50 nodes of 4; nearest: 4, 12 ranks \(layout.ranks_per_phase\)$"):
        make_chain_jobs(plan, 3, 4)


def test_derived_ranks_fill_whole_nodes() -> None:
    """12 ghost batches on at most 8 ranks: 6 is the largest divisor, and 4 the largest that fills nodes of 4."""
    layout = {"grow_by": "ranks", "max_micro_batch": 8}
    plan = compile_plan(small_job(layout=layout), 8, NUM_TRAIN)
    assert [layout.ranks for layout in plan.layouts] == [2, 6, 6, 6]
    fitting = on_whole_nodes(plan, 4)
    assert [layout.ranks for layout in fitting.layouts] == [2, 3, 4, 4]
    assert [(link.phases, link.nodes) for link in make_chain_jobs(fitting, 2, 4)] == [
        ("1-1", 1),
        ("2-2", 1),
        ("3-4", 1),
    ]
    assert compile_plan(with_ranks_per_phase(fitting), 8, NUM_TRAIN).layouts == fitting.layouts


@pytest.mark.parametrize("growth", [{"grow_by": "ranks"}, {"grow_by": "ranks", "max_ranks": 3}, {}])
def test_a_link_compiles_the_plan_of_the_whole_chain_whatever_its_own_ranks(growth: dict[str, Any]) -> None:
    plan = compile_plan(small_job(layout={**growth, "max_micro_batch": 8, "uneven_ranks": True}), 2, NUM_TRAIN)
    for ranks in (1, 2, 4, 7):
        assert compile_plan(with_ranks_per_phase(plan), ranks, NUM_TRAIN).layouts == plan.layouts


def test_a_job_of_a_chain_does_not_miss_the_ranks_of_the_others() -> None:
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 2, 4, 4]}
    plan, written = plan_for_ranks(small_job(layout=layout), LoneRank(1), phases=(1, 1))
    assert (plan.notes, written.notes) == ([], [])


NASTY = 'it\'s "my" run $(touch x) `y` 100% #1; rm *'


def test_the_scripts_of_a_chain_are_these_texts() -> None:
    job, run = small_job(), Path(f"/data/{NASTY}/small")
    site = Site(TEMPLATE, ("/opt/my python", "-m", "hvd_batchgrow.cli"), {"partition": "gpu", "gres": "gpu:4"})
    scripts = make_scripts(job, make_chain_jobs(plan_of([2, 4, 4, 12]), 3, 4), run, site)
    assert [script.path.name for script in scripts] == [
        "chain-job-1.sbatch",
        "chain-job-2.sbatch",
        "chain-job-3.sbatch",
    ]
    for k, script in enumerate(scripts):
        assert script.text == (GOLDEN / f"chain-job-{k + 1}.txt").read_text()


def test_the_two_templates_differ_in_how_they_launch_only() -> None:
    def common(name: str) -> list[str]:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        rest = text.partition("#SBATCH")[2]
        before, _, after = rest.partition("rank=(bash -c")
        return [before, after.partition("\nlauncher=")[2]]

    assert common("train") == common("train-mpirun")


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_whatever_the_arguments_hold_bash_reads_them_back(arguments: list[str]) -> None:
    text = render(TEMPLATE, {}, ("p",), arguments)
    line = text.partition("arguments=")[2].partition("\n\n# EDIT: how often")[0]
    script = f"arguments={line}\nprintf '%s\\0' \"${{arguments[@]}}\""
    said = subprocess.run(["bash", "-c", script], check=True, capture_output=True, env={}).stdout
    assert said.decode().split("\0")[:-1] == arguments


def test_a_template_keeps_what_its_user_has_edited() -> None:
    template = (
        "#!/bin/bash\n#SBATCH -p old\n#SBATCH --nodes=7\n# mine\n#SBATCH --time 5\n\nmodule load x\n"
        f"program=(my-own)\n{ARGUMENTS}\n"
    )
    text = render(template, {"nodes": "2", "partition": "new", "exclusive": ""}, ("other",), ("a b",))
    assert text == (
        "#!/bin/bash\n#SBATCH -p old\n# mine\n#SBATCH --time 5\n#SBATCH --nodes=2\n#SBATCH --partition=new\n"
        "#SBATCH --exclusive\n\nmodule load x\nprogram=(my-own)\narguments=('a b')\n"
    )


def test_a_template_line_of_several_options_stays_and_the_later_lines_override_it() -> None:
    kept = ["#SBATCH --nodes=1 --gres=gpu:4", "#SBATCH --ntasks=8 -p x", "#SBATCH -N 3"]
    lost = ["#SBATCH --ntasks=8", "#SBATCH --nodes 1   # one", "#SBATCH --exclusive # whole nodes"]
    template = "\n".join(["#!/bin/bash", *kept, *lost, ARGUMENTS])
    text = render(template, {"nodes": "2", "ntasks": "6", "exclusive": ""}, (), ())
    assert [line for line in text.splitlines() if "SBATCH" in line] == [
        *kept, "#SBATCH --nodes=2", "#SBATCH --ntasks=6", "#SBATCH --exclusive",
    ]  # fmt: skip


def test_variables_of_sbatch_that_override_what_was_decided_are_found() -> None:
    environment = dict.fromkeys(
        ["SBATCH_TIMELIMIT", "SBATCH_GRES", "SBATCH_NO_REQUEUE", "SBATCH_JOB_NAME", "SBATCH_PARTITION"], ""
    )
    environment |= dict.fromkeys(
        ["SBATCH_MEM", "SBATCH_MEM_PER_NODE", "SBATCH_QOS", "SBATCH_EXPORT", "TIME", "SBATCH_CPUS_PER_GPU"], ""
    )
    decided = ["SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE"]
    assert overriding_variables([], environment) == decided
    given = ["time", "gres", "mem", "cpus-per-gpu", "account"]
    more = ["SBATCH_CPUS_PER_GPU", "SBATCH_GRES", "SBATCH_MEM_PER_NODE", "SBATCH_TIMELIMIT"]
    assert overriding_variables(given, environment) == sorted([*decided, *more])


@pytest.mark.parametrize(
    "template", ["", "#!/bin/sh\necho\n", f"{ARGUMENTS}\n", f"#!/bin/sh\n{ARGUMENTS}\n{ARGUMENTS}\n"]
)
def test_a_template_without_a_place_for_the_arguments_is_refused(template: str) -> None:
    with pytest.raises(JobError, match=re.escape(ARGUMENTS)):
        render(template, {}, (), ())


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("gpu:a100:4", "#SBATCH --x=gpu:a100:4"),
        ("", "#SBATCH --x"),
        ("a b", '#SBATCH --x="a b"'),
        ('say "hi" \\ # $(x)', '#SBATCH --x="say \\"hi\\" \\\\ # $(x)"'),
    ],
)
def test_sbatch_reads_a_value_as_it_was_given(value: str, line: str) -> None:
    assert directive("x", value) == line


def test_a_value_cannot_add_lines() -> None:
    with pytest.raises(JobError, match=r"--partition: a line of a batch script cannot hold 'gpu\\ntouch x'"):
        directive("partition", "gpu\ntouch x")
    with pytest.raises(JobError, match="cannot contain a backslash or a line break"):
        log_pattern(Path("/runs/a\nb"))
    with pytest.raises(JobError, match="cannot contain a backslash"):
        log_pattern(Path("/runs/a\\b"))


def test_a_percent_sign_in_a_path_stands_for_itself() -> None:
    assert log_pattern(Path("/100%j")) == "/100%%j/%x-%j.out"


def test_more_options_of_sbatch() -> None:
    assert extra_options(["constraint=a100|h100", "--qos=long", "exclusive"]) == {
        "constraint": "a100|h100",
        "qos": "long",
        "exclusive": "",
    }
    with pytest.raises(JobError, match="--sbatch: qos is given twice: 'long' and 'short'"):
        extra_options(["qos=long", "qos=short"])
    with pytest.raises(JobError, match="2 faults") as caught:
        extra_options(["nodes=4", "-N4"])
    assert "--sbatch: nodes is set by submit" in str(caught.value)
    assert "must be KEY=VALUE with a long option name of sbatch, got '-N4'" in str(caught.value)


def test_the_commands_of_a_dry_run_are_lines_for_a_shell(tmp_path: Path) -> None:
    """A shell in which sbatch is a function that says what it got, and gives numbers from 1."""
    scripts = [Path(f"/r/{NASTY}\n/chain-job-{k}.sbatch") for k in (1, 2, 3)]
    count = tmp_path / "count"
    count.write_text("")
    number = f"echo >>{shlex.quote(str(count))}; wc -l <{shlex.quote(str(count))}"
    fake = f"sbatch() {{ printf '%s\\0' \"$@\" END >&2; {number}; }}"
    lines = "\n".join([fake, *dry_commands(scripts, [])])
    said = subprocess.run(["bash", "-c", lines], check=True, capture_output=True, cwd=tmp_path).stderr.decode()
    calls = [call.split("\0")[:-1] for call in said.split("END\0")[:-1]]
    afters = [
        [],
        ["--dependency=afterok:4", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:5", "--kill-on-invalid-dep=yes"],
    ]
    assert calls == [
        *(["--test-only", str(script)] for script in scripts),
        *(["--parsable", *after, str(script)] for after, script in zip(afters, scripts, strict=True)),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_ranks_that_no_phase_uses_are_reported() -> None:
    plan = compile_plan(small_job(layout={"grow_by": "ranks", "ranks_per_phase": [1, 2, 2, 2]}), 3, NUM_TRAIN)
    notes = {ranks: notes_on_ranks(plan, ranks) for ranks in (2, 3, 4)}
    assert notes == {2: [], 3: ["1 of 3 ranks is never used"], 4: ["2 of 4 ranks are never used"]}
