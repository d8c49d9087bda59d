"""The command line, in this process and with one rank."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.results.run_summary import read_summary
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from tests.helpers import job_tree


def test_plan_prints_data_for_scripts(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--ranks", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    keys = {"start_epoch", "num_updates", "lr", "momentum", "global_batch", "ranks", "accumulation", "micro_batch"}
    assert keys | {"noise_scale"} <= set(plan["phases"][0])
    assert plan["num_updates"] == 17


def test_plan_shows_the_twin_and_the_saving(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job]) == 0
    text = capsys.readouterr().out
    assert "small-twin" in text
    assert "2.47× fewer updates than the twin" in text  # 42 / 17


def test_plan_prints_the_twin_as_a_job_file(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--twin"]) == 0
    Path("twin.toml").write_text(capsys.readouterr().out)
    assert main(["plan", "twin.toml", "--json"]) == 0
    twin = json.loads(capsys.readouterr().out)
    assert main(["plan", job, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["twin"]["phases"] == twin["phases"]
    assert both["updates_ratio"] == pytest.approx(42 / 17)
    assert main(["plan", "twin.toml", "--twin"]) == 2
    assert "schedule.policy: 'decay' is its own twin" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "start"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")])
def test_plan_draws_a_plot(job: str, name: str, start: bytes) -> None:
    assert main(["plan", job, "--plot", name]) == 0
    assert Path(name).read_bytes().startswith(start)


def test_plan_reports_why_it_cannot_draw(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--plot", "plan.xyz"]) == 1
    assert "plan.xyz cannot be drawn: Format 'xyz' is not supported" in capsys.readouterr().err


def test_plan_and_train_report_that_nothing_is_measured(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [job, "--gradient-noise.measure", "true", "--layout.max-micro-batch", "16"]
    for command in (["plan", *options], ["train", *options, "--max-updates", "1", "--runs-dir", str(tmp_path)]):
        main(command)
        assert "layout.max_micro_batch: 16 makes a batch of 16 one micro-batch: tr(Σ)" in "".join(capsys.readouterr())


def test_plan_needs_no_data_and_no_large_package(job: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hvd_batchgrow.cli import main; "
        f"assert main(['plan', '{job}', '--data.root', '/nonexistent']) == 0; "
        "assert {'torch', 'numpy', 'typeguard', 'asyncio'}.isdisjoint(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_train_refuses_a_finished_run_unless_it_resumes(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job]) == 0
    assert "small: done: 17 of 17 updates" in capsys.readouterr().err
    assert main(["train", job]) == 1
    assert "runs/small holds a run already" in capsys.readouterr().err
    assert main(["train", job, "--resume", "auto"]) == 0
    assert "resumed at 688 of 688 samples" in capsys.readouterr().err
    assert main(["train", job, "--name", "second", "--layout.max-micro-batch", "8"]) == 0
    assert Path("runs/second/plan.json").exists()


def test_a_batch_script_sees_by_a_file_whether_the_training_is_done(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "unfinished"
    monkeypatch.setenv("HVD_BATCHGROW_UNFINISHED", str(unfinished))
    assert main(["train", job, "--max-updates", "1"]) == 75
    assert unfinished.exists()
    assert main(["train", job, "--resume", "auto"]) == 0
    assert not unfinished.exists()


def test_twin_compares_the_two_runs(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["twin", job, "--runs-dir", "$(out) 'put"]) == 0
    text = capsys.readouterr().out
    assert "17 = 17" in text
    assert "42 = 42" in text
    assert "run folder: $(out) 'put/small-twin" in text
    (curves,) = [line for line in text.splitlines() if line.startswith("curves: ")]
    assert shlex.split(curves)[1:] == ["tensorboard", "--host", "localhost", "--logdir", "$(out) 'put"]
    assert "accuracy" in text


def test_digest_prints_a_hash_of_the_weights_and_how_runs_differ(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[tuple[str, list[str]]] = [
        ("a", []),
        ("b", []),
        # The same ghost batches, two per micro-batch: float32 rounds differently.
        ("c", ["--layout.max-micro-batch", "8"]),
        ("d", ["--schedule.epochs", "3"]),
    ]
    for name, options in runs:
        assert main(["train", job, "--name", name, *options]) == 0
    capsys.readouterr()
    assert main(["digest", "runs/a"]) == 0
    alone = capsys.readouterr().out
    assert main(["digest", "runs/a", "runs/b", "runs/c", "runs/d"]) == 0
    a, b, c, d = capsys.readouterr().out.splitlines()
    assert alone.strip() == a.split()[0]
    assert len(alone.strip()) == 64
    assert b == f"{a.split()[0]}  runs/b  bit-identical"
    assert float(c.split("differs by ")[1].split()[0]) < 1e-4
    assert d.endswith("at another sample: 976 instead of 688")


def test_digest_refuses_a_folder_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digest", str(tmp_path)]) == 1
    assert "does not hold a run" in capsys.readouterr().err
    assert main(["digest", str(tmp_path), "--optim.lr", "1"]) == 2
    assert "optim.lr: this command reads no job file, so it has no keys to override" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "missing.toml"], 2, "missing.toml: 1 fault\n  cannot be read: No such file or directory"),
        (
            ["plan", "small.toml", "--schedule.factr", "3"],
            2,
            "schedule.factr: unknown key; did you mean schedule.noise_factor?",
        ),
        (["plan", "small.toml", "--ranks", "5"], 2, "global batch 16 = 2 ghost batches of 8 for 5 ranks"),
        (["train", "small.toml", "--optim.lr", "-1"], 2, "optim.lr: must be greater than 0, got -1"),
        (
            ["plan", "small.toml", "--schedule.policy", "decay"],
            2,
            "max_batch: unknown key of 'decay'; it belongs to adabatch, adaptive, grow",
        ),
        (["train", "small.toml", "--overwrite", "--resume", "auto"], 2, "--overwrite: contradicts --resume auto"),
        (
            ["plan", "small.toml", "--replay", "d.jsonl"],
            2,
            "--replay: schedule.policy = 'grow' is fixed: there is nothing",
        ),
        (
            ["train", "small.toml", "--replay", "d.jsonl"],
            2,
            "--replay: schedule.policy = 'grow' is fixed: there is nothing",
        ),
        (["plan", "small.toml", "--data.hflip", "--json"], 2, "data.hflip: has no value"),
        (["plan", "small.toml", "--schedule.epochs", "1e-9"], 2, "1e-09 of N = 300 samples is less than one sample"),
        (["train", "small.toml", "--data.source", "cifar1O"], 2, "data.source: did you mean 'cifar10'?"),
        (["train", "small.toml", "--model.name", "vgg"], 2, "model.name: did you mean 'vgg"),
        (
            ["train", "small.toml", "--layout.grow_by", "ranks", "--layout.ranks_per_phase", "[1,2,1,1]"],
            2,
            "planned for 2",
        ),
        (
            ["plan", "small.toml", "--data.source", "mine.py:load"],
            2,
            "did you mean 'mine:load'? must be module:name, not FILE.py:name",
        ),
        (["plan", "small.toml", "--model.name", "./nets/mine.py:Net"], 2, "did you mean 'nets.mine:Net'?"),
        (
            ["plan", "small.toml", "--task.name", "mine.py:Task"],
            2,
            "did you mean 'mine:Task'? must be module:name, not",
        ),
        (["train", "small.toml", "--logging.observers", '["mine.py:See"]'], 2, "did you mean 'mine:See'?"),
        (
            ["plan", "small.toml", "--logging.observers", "obs:Bad"],
            2,
            """must be a list, got 'obs:Bad'; use '["obs:Bad"]'""",
        ),
        (["plan", "small.toml", "--data.class_names", "a, b"], 2, """must be a list, got 'a, b'; use '["a", "b"]'"""),
        (["plan", "small.toml", "--model.channels", "16,32"], 2, "must be a list, got '16,32'; use '[16, 32]'"),
        (
            ["plan", "small.toml", "--task.class_weights", "balanced"],
            2,
            "task.class_weights: must be a list of numbers, got 'balanced'\n",
        ),
        (["train", "small.toml", "--logging.observers", '["obs:Bad"]'], 2, "small: 1 fault\n  logging.observers[0]: "),
        (
            ["plan", "small.toml", "--cost", "small.toml"],
            2,
            "small.toml: 1 fault\n  is a job file; --cost needs the PROBE",
        ),
        (["train", "small.toml", "--cost", "P.json"], 2, "--cost: is for layout.grow_by = 'auto', and the job has"),
        (["submit", "small.toml", "--nodes-max", "1", "--cost", "P.json"], 2, "--cost: is for layout.grow_by = 'auto'"),
        (["twin", "twin.toml"], 2, "schedule.policy: 'decay' is the policy of the twin"),
        (["train", "small.toml", "--data.root", "nowhere"], 1, "data.root = nowhere is not a folder; looked for in /"),
        (["plan", "small.toml", "--optim.learning-rate", "0.1"], 2, "unknown key; did you mean optim.lr?"),
        (["plan", "small.toml", "--schedule.batch_size=8"], 2, "unknown key; did you mean schedule.global_batch?"),
    ],
)
def test_faults_end_with_a_message_and_no_run_folder(
    job: str, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = job_tree(schedule={"policy": "decay"})
    Path("twin.toml").write_text(tomli_w.dumps(tree))
    assert main(words) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_faults_of_the_data_are_reported_with_the_name_of_the_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--data.source", "ownata:load", "--data.num-samples", "300"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("small: 1 fault\n  data.source: ownata:load cannot be imported")
    assert f"looked for in the working directory {Path.cwd()} and on Python's path" in error


def test_samples_are_counted_unless_their_number_is_known(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree = job_tree()
    tree["data"] = {"source": "csv", "root": "table", "validation_fraction": 0.1}
    tree["model"] = {"name": "dense7", "ghost_batch": tree["model"]["ghost_batch"]}
    rows = [f"{k % 7},{k % 3}.5,{k % 2}" for k in range(300)]
    Path("table").mkdir()
    for name, part in (("train.csv", rows), ("test.csv", rows[:20])):
        Path("table", name).write_text("\n".join(["a,b,label", *part]) + "\n")
    Path(job).write_text(tomli_w.dumps(tree))
    assert main(["plan", job]) == 0
    assert "N = 270, validation samples: 30" in capsys.readouterr().out
    assert main(["train", job, "--max-updates", "1"]) == 75
    assert tomllib.loads(Path("runs/small/job.toml").read_text())["data"]["num_samples"] == 300
    assert main(["plan", job, "--data.root", "tabel"]) == 1
    assert "tabel is not a folder; did you mean table?" in capsys.readouterr().err


def test_plan_twin_contradicts_json_and_plot(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--twin", "--json", "--plot", "plan.png"]) == 2
    error = capsys.readouterr().err
    assert "--json: contradicts --twin" in error
    assert "--plot: contradicts --twin" in error


def test_a_source_with_a_dot_instead_of_a_colon_gets_a_suggestion(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job, "--data.source", "mydata.photos"]) == 2
    assert "did you mean 'mydata:photos'?" in capsys.readouterr().err


def test_usage_errors_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "x.toml", "--rnks", "3"]) == 2
    assert main(["trian"]) == 2
    for words in ([], ["plan"], ["plan", "a", "b"], ["train", "a", "--seed"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


def test_a_damaged_checkpoint_is_skipped_at_a_resume(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", job])
    newest = checkpoint_paths(Path("runs/small/checkpoints"))[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:1000])
    capsys.readouterr()
    assert main(["digest", "runs/small"]) == 0
    assert f"skipped a checkpoint: {newest}: cut short" in capsys.readouterr().err
    assert main(["train", job, "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    assert f"skipped a checkpoint: {newest}: cut short" in error
    assert "small: done: 17 of 17 updates" in error
    assert newest.stat().st_size == len(whole)


def _fail(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("a bug")


def test_an_unexpected_error_is_printed_with_its_rank_and_traceback(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvd_batchgrow.train.update.engine.UpdateEngine.update", _fail)
    monkeypatch.setattr("hvd_batchgrow.comm.ranks.SingleRank.abort", lambda self, code: None)
    with pytest.raises(ZeroDivisionError):
        main(["train", job])
    error = capsys.readouterr().err
    assert "rank 0 of 1 on " in error
    assert "ZeroDivisionError: a bug" in error


def test_a_probe_predicts_the_cost_of_a_plan_and_decides_auto(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", job, "--out", "P.json", "--budget-s", "0.1"]) == 0
    assert "hvd-batchgrow plan small.toml --ranks 1 --cost P.json" in capsys.readouterr().err.replace("\n", " ")
    assert not Path("runs").exists()
    assert main(["plan", job, "--cost", "P.json"]) == 0
    text = capsys.readouterr().out
    assert "predicted, training alone" in text
    assert "ranks are held" in text
    assert main(["plan", job, "--cost", "P.json", "--layout.grow_by", "auto", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"]["seconds"] == pytest.approx(sum(p["seconds"] for p in plan["cost"]["phases"]))
    assert [phase["ranks"] for phase in plan["phases"]] == [1] * 4
    assert plan["twin"]["cost"]["seconds"] > 0
    assert main(["plan", job, "--cost", "P.json", "--model.channels", "[4, 4]"]) == 2
    assert "model.channels: is [4, 4], but the probe was measured with [4, 8]" in capsys.readouterr().err
    Path("P.json").write_text("{")
    assert main(["plan", job, "--cost", "P.json"]) == 1
    assert "P.json is damaged, or not a probe" in capsys.readouterr().err


def test_overwrite_keeps_the_old_run_if_the_network_cannot_be_built(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--max-updates", "1"]) == 75
    before = sorted(Path("runs/small/checkpoints").iterdir())
    Path("small.toml").write_text(Path("small.toml").read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job, "--overwrite", "--model.name", "no_such_module:net"]) == 2
    assert "model.name: " in capsys.readouterr().err
    assert sorted(Path("runs/small/checkpoints").iterdir()) == before


def test_overwrite_replaces_the_run_that_a_link_points_to(job: str) -> None:
    """The defect: it renamed the link, and then failed, so that the next attempt trained in another folder."""
    real = Path("scratch/real").absolute()
    real.mkdir(parents=True)
    Path("runs").mkdir()
    Path("runs/small").symlink_to(real)
    for more in ([], ["--overwrite"]):
        assert main(["train", job, "--max-updates", "1", *more]) == 75
        assert Path("runs/small").is_symlink()
        assert (real / "plan.json").exists()
    assert len(json.loads((real / "record.json").read_text())["attempts"]) == 1


def test_a_working_folder_that_cannot_be_written_does_not_end_the_training(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_UNFINISHED", "no/such/folder/.unfinished-1-0")
    assert main(["train", job, "--max-updates", "1"]) == 75
    assert "note: no/such/folder/.unfinished-1-0 cannot be written: No such file" in capsys.readouterr().err


def test_a_probe_that_cannot_be_written_is_an_error_before_the_measurement(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, fault in (
        ("no/P.json", f"the folder {Path('no').resolve()} does not exist"),
        (".", "nearest: PROBE.json"),
    ):
        assert main(["probe", job, "--out", out]) == 1
        text = capsys.readouterr().err
        assert fault in text
        assert "ranks" not in text  # the first line of a measurement


@pytest.mark.slow
@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("2>&-", 0), (">/dev/full", 1)])
def test_a_closed_or_full_stream_gives_no_traceback(job: str, redirect: str, code: int) -> None:
    words = shlex.join([sys.executable, "-m", "hvd_batchgrow.cli", "plan", job])
    done = subprocess.run(["bash", "-c", f"{words} {redirect}"], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == ("the output cannot be written: No space left on device\n" if code else "")


@pytest.mark.slow
def test_a_log_without_a_reader_does_not_end_the_training(job: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "hvd_batchgrow.cli", "train", job]
        done = subprocess.run(command, stderr=writer, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert read_summary(Path("runs/small")).state == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--json"], ["--twin"]])
def test_a_closed_pipe_is_not_an_error(job: str, more: list[str]) -> None:
    """The defect: `plan --json | head` ended in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "hvd_batchgrow.cli", "plan", job, *more]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
