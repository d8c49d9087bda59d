"""Branches and forks of a run in which a replay check has failed, and those that have lost their checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.train.replay_failure import write_failure
from tests.helpers import enter_copy, enter_with_job, job_tree

pytestmark = pytest.mark.slow

RUN = Path("runs/small")
BRANCH = ["branch", str(RUN), "--at", "160", "--factors", "1,2", "--samples", "1600", "--only", "1"]
FORK = ["train", "job.toml", "--fork", "other", "--optim.lr", "0.02"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped at sample 256, with checkpoints at 160 and 256."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("suspect")
        enter_with_job(folder, job_tree("data"), patch)
        assert main(["train", "job.toml", "--max-updates", "12"]) == 75
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    enter_copy(trained, tmp_path / "copy", monkeypatch)
    return RUN


def contents(run: Path) -> dict[Path, bytes]:
    """Return the files of a run outside its branches."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "branches" not in path.parts}


@pytest.mark.parametrize("words", [BRANCH, FORK], ids=["branch", "fork"])
def test_a_branch_or_fork_that_is_refused_leaves_nothing(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_failure(here, "rank 1 is wrong", 240, None)
    for _ in range(2):
        assert main(words) == 1
        assert f"{RUN}: the replay check at sample 240 failed, and no check has passed" in capsys.readouterr().err
        assert not list(Path("runs").rglob("k1"))
        assert not Path("runs/other").exists()


def test_a_branch_from_before_the_failed_check_changes_no_file_of_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_failure(here, "rank 1 is wrong", 240, 160)
    before = contents(here)
    assert here / "failed_check.json" in before
    assert main(BRANCH) == 0
    assert contents(here) == before
    assert main(["train", "job.toml", "--resume", "auto"]) == 1
    assert "the last check passed at sample 160" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "again", "samples"),
    [
        (BRANCH, BRANCH, 160),
        ([*FORK, "--max-updates", "1"], ["train", "job.toml", "--name", "other", "--resume", "auto"], 256),
    ],
    ids=["branch", "fork"],
)
def test_a_fork_without_checkpoints_does_not_start_from_random_weights(
    here: Path, words: list[str], again: list[str], samples: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in {0, 75}
    (fork,) = [path.parent for path in Path("runs").rglob("record.json") if path.parent != here]
    shutil.rmtree(fork / "checkpoints")
    before = contents(here.parent)
    capsys.readouterr()
    assert main(again) == 1
    error = f"{fork} is a fork of {here.absolute()} at sample {samples} and holds no checkpoint: remove the folder"
    assert error in capsys.readouterr().err
    assert contents(here.parent) == before
    shutil.rmtree(fork)
    assert main(words) in {0, 75}
