"""docs/guide.md: its files and its commands, in an empty folder, but for the commands that need Slurm."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guide import PAGE, Block, blocks, files, write_files
from tests.launch.test_forms import captured, for_any_machine

LOCAL = [block for block in blocks() if not block.needs_slurm]
RUNS = ["stripes-seed0", "stripes-seed0-twin", "stripes-seed1", "stripes-seed1-twin"]


@dataclass(frozen=True)
class Done:
    """The folder of a reader who has typed everything but what needs Slurm, and what each block printed."""

    folder: Path
    outputs: dict[Block, str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Run the blocks in the order of the page: each needs the files of those before."""
    folder = tmp_path_factory.mktemp("guide")
    write_files(folder)
    outputs = {}
    for block in LOCAL:
        script = f"exec 2>&1\n{for_any_machine(block.script)}"
        ended = captured(["bash", "-euo", "pipefail", "-c", script], folder, timeout_s=1200)
        assert ended.returncode == 0, f"{block.script}{ended.stdout}"
        outputs[block] = ended.stdout
    return Done(folder, outputs)


def test_each_section_has_commands_and_only_the_chain_needs_slurm() -> None:
    # Every fence of the page is a file, commands, or the output of the commands above it.
    fences = Counter(re.findall(r"^```(\w*)\n.*?^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
    outputs = sum(bool(block.shown) for block in blocks())
    assert fences == {"python": 2, "toml": 1, "sh": len(blocks()), "": outputs}
    assert list(files()) == ["mine.py", "train.py", "job.toml"]
    assert [block.commands for block in blocks() if block.needs_slurm] == [
        ['hvd-batchgrow submit job.toml --nodes-max 2 --layout.grow_by ranks --layout.ranks-per-phase "[1, 2, 2]"'],
        ["hvd-batchgrow status runs/stripes"],
    ]
    assert len({block.section for block in LOCAL}) == 7


@pytest.mark.parametrize("block", LOCAL, ids=lambda block: block.section)
def test_the_commands_print_what_the_page_shows(done: Done, block: Block) -> None:
    assert block.first_missing(done.outputs[block]) is None, done.outputs[block]


def test_the_runs_learn_and_the_report_has_them(done: Done) -> None:
    for name in RUNS:
        records = map(json.loads, (done.folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
        last = [record for record in records if record["kind"] == "eval"][-1]
        assert last["top1"] > 0.8, name
    page, markdown = ((done.folder / name).read_text() for name in ("report.html", "report/report.md"))
    assert all(name in page and name in markdown for name in RUNS)
    assert {path.suffix for path in (done.folder / "report" / "figures").iterdir()} == {".png", ".svg"}


def test_a_line_that_a_plan_does_not_print_is_found() -> None:
    block = Block("The job", "hvd-batchgrow plan job.toml\n", "lr 0.1\n…\n257 updates, 36,096 …\n")
    assert block.first_missing("  lr   0.1 \nother\n257 updates, 36,096 samples") is None
    assert block.first_missing("257 updates, 36,096 samples\nlr 0.1") == "257 updates, 36,096 …"
    assert block.first_missing("lr 0.2\n257 updates, 36,096 samples") == "lr 0.1"


def test_only_measured_figures_may_differ() -> None:
    block = Block("Train", "hvd-batchgrow train job.toml\n", "257 of 257 updates in 3 s, loss 0.12\n1: job 7 DONE\n")
    assert block.first_missing("257 of 257 updates in 1:03 min, loss 2.2e-05\n1: job 80 DONE") is None
    assert block.first_missing("257 of 258 updates in 3 s, loss 0.12\n1: job 7 DONE") is not None
    assert block.first_missing("257 of 257 updates in 3 s, loss 0.12\n1: job 7 FAILED") == "1: job 7 DONE"
