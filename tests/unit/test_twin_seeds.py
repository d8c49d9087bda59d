"""`twin --seeds`: pairs of runs that are trained once, found again, and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.results.outcomes import read_outcomes
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from tests.helpers import enter_copy, enter_with_job, job_tree, measured_tree
from tests.reported_runs import change_json
from tests.training import weights

NAMES = ["small-seed7", "small-seed7-twin", "small-seed8", "small-seed8-twin"]
TWIN = ["twin", "job.toml", "--seeds", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its two pairs, trained in one invocation."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pairs")
        schedule = {"epochs": 1.2, "boundaries_epochs": [0.4, 0.8]}
        enter_with_job(folder, job_tree("data", schedule=schedule), patch)
        assert main(TWIN) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    enter_copy(trained, tmp_path / "copy", monkeypatch)
    return Path("runs")


@pytest.mark.slow
def test_a_replay_has_a_twin_and_readable_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = measured_tree("data", {"name": "plateau", "patience_epochs": 1.0}, schedule={"epochs": 1.2})
    enter_with_job(tmp_path, tree, monkeypatch)
    decision = Decision(160, "plateau", "no improvement", 16, 48, 48.0, 0.05, 0.05)
    Path("decisions.jsonl").write_bytes(decisions_text(None, [decision]))
    assert main(["twin", "job.toml", "--replay", "decisions.jsonl"]) == 0
    assert main(["list"]) == 0
    assert main(["compare", "runs"]) == 0
    growing, twin = (RunFiles.read(Path("runs") / name) for name in ("small", "small-twin"))
    assert (growing.faults, twin.faults) == ((), ())
    assert growing.decisions == (decision.to_dict(),)
    assert [phase["global_batch"] for phase in growing.plan["phases"]] == [16, 48]
    assert [phase["lr"] for phase in twin.plan["phases"]] == pytest.approx([0.05, 0.05 / 3])


def test_each_pair_has_one_seed_one_stream_and_the_same_samples(here: Path) -> None:
    assert sorted(path.name for path in here.iterdir() if not path.name.startswith(".")) == NAMES
    runs = [RunFiles.read(here / name) for name in NAMES]
    assert [run.seed for run in runs] == [7, 7, 8, 8]
    assert [run.job["schedule"]["policy"] for run in runs] == ["grow", "decay", "grow", "decay"]
    assert len({run.plan["num_samples"] for run in runs}) == 1
    digests = []
    for name in NAMES:
        lines = (here / name / "consumed.jsonl").read_text().splitlines()
        digests.append(json.loads(lines[0])["digest"])  # of the first update, which has the same batch in both arms
    assert digests[0] == digests[1] != digests[2] == digests[3]
    for run in runs:
        outcomes = read_outcomes(run.folder)
        assert outcomes is not None
        assert outcomes.correct is not None
        assert outcomes.correct.mean() == run.evaluations[-1]["top1"]


def test_the_comparison_of_finished_pairs_is_printed_again_without_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main([*TWIN, "--resume", "auto", "--margin", "100"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("verdict: equivalent within 100 points: ")
    assert [line for line in err.splitlines() if line.endswith("is finished")] == [
        f"runs/{name} is finished" for name in NAMES
    ]
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    results = [100 * RunFiles.read(here / name).evaluations[-1]["top1"] for name in NAMES]
    for seed, (first, second) in {7: results[:2], 8: results[2:]}.items():
        (row,) = [line.split() for line in out.splitlines() if line.strip().startswith(f"{seed} ")]
        assert row[1:6] == [f"{first:.2f}", "%", f"{second:.2f}", "%", f"{first - second:+.2f}"]


def test_only_missing_runs_are_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = weights(here / NAMES[2])
    shutil.rmtree(here / NAMES[2])
    assert main([*TWIN, "--resume", "auto"]) == 0
    assert capsys.readouterr().err.count("is finished") == 3
    assert weights(here / NAMES[2]) == wanted
    assert [len(RunFiles.read(here / name).attempts) for name in NAMES] == [1, 1, 1, 1]


def test_a_run_that_was_killed_before_its_last_checkpoint_is_finished(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, newest = weights(here / NAMES[1]), checkpoint_paths(here / NAMES[1] / "checkpoints")[-1]
    newest.unlink()
    assert main([*TWIN, "--resume", "auto"]) == 0
    assert capsys.readouterr().err.count("is finished") == 3
    assert newest.exists()
    assert weights(here / NAMES[1]) == wanted


def test_a_run_whose_last_evaluation_failed_is_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_json(here / NAMES[1] / "record.json", lambda record: record["attempts"][-1].update(error="not finite"))
    assert main([*TWIN, "--resume", "auto"]) == 0
    assert capsys.readouterr().err.count("is finished") == 3
    assert [len(RunFiles.read(here / name).attempts) for name in NAMES] == [1, 2, 1, 1]


@pytest.mark.slow
def test_a_stopped_command_continues_where_it_stopped(here: Path) -> None:
    wanted = [weights(here / name) for name in NAMES]
    shutil.rmtree(here)
    codes: list[int] = []
    while not codes or codes[-1]:
        codes.append(main([*TWIN, "--resume", "auto", "--max-updates", "14"]))
        assert len(codes) < 9
    assert set(codes[:-1]) == {75}
    assert len(codes) > 2
    assert [weights(here / name) for name in NAMES] == wanted


def test_without_resume_nothing_is_trained_if_a_run_exists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES[:3]:
        shutil.rmtree(here / name)
    assert main(TWIN) == 1
    assert f"runs/{NAMES[3]} holds a run already: add --resume auto to keep and finish them" in capsys.readouterr().err
    assert not (here / NAMES[0]).exists()


def test_finished_runs_of_another_job_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TWIN, "--resume", "auto", "--optim.lr", "0.01"]) == 1
    assert "these settings affect the weights and have changed" in capsys.readouterr().err


def test_one_pair_keeps_its_names_and_shows_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["twin", "job.toml", "--runs-dir", "one", "--margin", "1"]) == 0
    assert sorted(path.name for path in Path("one").iterdir() if path.is_dir()) == ["small", "small-twin"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: not shown: n = 1 (seed 7)")
