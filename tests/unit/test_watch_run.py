"""`watch`: follows a run by its files, whatever happens to them, and ends when the run does."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.watcher import GRACE_S, Watcher
from hvd_batchgrow.results.lock_watch import LockWatch
from hvd_batchgrow.results.run_follower import RunFollower
from hvd_batchgrow.results.run_summary import FRESH_S
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.storage.follow_json_lines import JsonLinesFollower
from tests.helpers import NUM_TRAIN, small_job
from tests.unit.test_live_view import evaluation, line

PLAN = compile_plan(small_job(), 2, NUM_TRAIN)
END = PLAN.schedule.end_samples


def text_of(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in lines)


def replace(path: Path, text: str) -> None:
    """Replace a file as the program does: by renaming another one."""
    other = path.with_name("other")
    other.write_text(text)
    other.rename(path)


# --- the file


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[JsonLinesFollower]:
    with closing(JsonLinesFollower(tmp_path / "metrics.jsonl")) as found:
        yield found


def samples(follower: JsonLinesFollower) -> list[int]:
    return [each["samples"] for each in follower.lines()]


def test_only_new_bytes_are_read_and_only_whole_lines_count(tmp_path: Path, follower: JsonLinesFollower) -> None:
    assert (follower.reopened(), samples(follower)) == (False, [])  # not there yet
    text, found = text_of(line(16, 1), line(32, 2), line(48, 3)), []
    for end in range(7, len(text) + 7, 7):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(text[end - 7 : end])
        assert not follower.reopened()
        found += samples(follower)
        assert found == [16 * (k + 1) for k in range(text[:end].count("\n"))]
    assert found == [16, 32, 48]
    assert follower.bytes_read == len(text.encode())


@pytest.mark.parametrize("how", ["renamed", "truncated", "removed"])
def test_a_replaced_file_is_read_again(tmp_path: Path, follower: JsonLinesFollower, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(line(16, 1), line(32, 2), line(48, 3)) + '{"kind": "tr')
    assert (follower.reopened(), samples(follower)) == (False, [16, 32, 48])
    if how == "removed":
        path.unlink()
        assert (follower.reopened(), samples(follower)) == (True, [])
    if how == "truncated":
        os.truncate(path, len(text_of(line(16, 1))))
    else:
        replace(path, text_of(line(16, 1)))
    assert (follower.reopened(), samples(follower)) == (how != "removed", [16])
    with path.open("a") as file:
        file.write(text_of(line(32, 2)))
    assert (follower.reopened(), samples(follower)) == (False, [32])


def test_a_file_that_was_replaced_on_another_machine_is_read_again(
    tmp_path: Path, follower: JsonLinesFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(line(16, 1), line(32, 2)))
    assert (follower.reopened(), samples(follower)) == (False, [16, 32])
    replace(path, text_of(line(16, 1)))

    def stale(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("os.fstat", stale)
        assert follower.reopened()  # and not as a new file, whose lines are new
    assert samples(follower) == [16]
    assert follower._file is not None
    follower._file.close()
    follower._file = Unreadable()  # type: ignore[assignment]
    assert samples(follower) == []
    assert (follower.reopened(), samples(follower)) == (True, [16])


class Unreadable:
    """A file whose handle is stale."""

    def read(self, size: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    "bad", ["x", "[1]", '{"samples": "16"}', '{"samples": -1}', "[" * 99_999, '{"samples": 8}', "\0"]
)
def test_damaged_lines_are_skipped(tmp_path: Path, follower: JsonLinesFollower, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text_of(line(16, 1)) + bad + "\n" + text_of(line(32, 2)))
    follower.reopened()
    assert samples(follower) == [16, 32]


def test_a_pipe_is_not_opened(tmp_path: Path, follower: JsonLinesFollower) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert (follower.reopened(), samples(follower)) == (False, [])


# --- the run


class Run:
    """A run whose files the test writes in steps; the watcher polls after each step, once per second."""

    def __init__(self, root: Path, steps: list[Callable[[], object]], *, terminal: bool = False) -> None:
        self.folder, self.now_s = root / "runs" / "small", 0.0
        self.folder.mkdir(parents=True)
        self.metrics = self.folder / "metrics.jsonl"
        self.lock = root / "runs" / ".small.lock"
        self.steps, self.out = steps, io.StringIO()
        self.beat = 0
        self.terminal = terminal

    def plan(self, **changes: Any) -> None:
        replace(self.folder / "plan.json", json.dumps(PLAN.to_dict() | changes))

    def append(self, *lines: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(text_of(*lines))

    def hold(self) -> None:
        self.beat += 1
        self.lock.write_text(f"process 7 on node3\nmachine x beat {self.beat}\n")

    def release(self) -> None:
        self.lock.write_text("")

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        assert self.now_s < 200, "the watcher does not end"
        if self.steps:
            self.steps.pop(0)()

    def watch(self, line_every_s: float | None = None) -> tuple[int, list[str]]:
        console = PlainConsole(self.out, 140, is_terminal=self.terminal)
        lock = LockWatch(self.folder, lambda: self.now_s)
        follower = RunFollower(self.folder, lambda: self.now_s)
        code = Watcher(console, follower, lock, line_every_s, lambda: self.now_s, self.sleep).run()
        follower.metrics.close()
        follower.branches.close()
        return code, self.out.getvalue().splitlines()


def wait() -> None:
    """Do nothing for a second."""


@pytest.fixture
def steps() -> list[Callable[[], object]]:
    return []


def test_a_run_is_followed_from_before_its_start_to_its_end(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    steps += [run.hold, run.plan, lambda: run.append(line(16, 1)), wait]
    steps += [lambda: run.append(line(32, 2), evaluation(32, 0.75)), lambda: run.append(line(END, 19, phase=3))]
    steps += [lambda: run.append(evaluation(END, 0.5)), run.release]
    code, lines = run.watch(line_every_s=2.0)
    assert code == 0
    assert lines[0].endswith("runs/small: waiting for the run to start: it has no plan.json yet")
    assert lines[1].endswith("runs/small: trained by process 7 on node3")
    assert lines[2:4] == [
        "phase 1: global batch 16, lr 0.05",
        f"{1600 / END:.1f} %: epoch 0.05, B 16, lr 0.05, loss 1.9840, 16 samples/s, all-reduce 12.2 %; "
        + lines[3].partition("; ")[2],
    ]
    assert lines[4].startswith(f"{3200 / END:.1f} %: epoch 0.11, ")
    assert lines[5].startswith("epoch 0.11: B 16, lr 0.05, loss 1.9760, 16 samples/s, all-reduce 12.2 %, ")
    assert lines[5].endswith(", test loss 0.5000, test accuracy 75.00 %")
    assert lines[6] == "phase 4: global batch 16, lr 0.05"
    assert "runs/small: finished" in "\n".join(lines)
    assert "best during training: test accuracy 75.00 %" in lines[-2]


def test_a_resume_with_fewer_lines_is_noticed(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    run.append(line(16, 1), line(32, 2), line(48, 3), evaluation(48, 0.5))
    steps += [run.hold, lambda: replace(run.metrics, text_of(line(16, 1))), run.hold]
    steps += [lambda: run.append(line(END, 19, phase=3)), run.release]
    code, lines = run.watch()
    assert code == 0
    assert lines[0].startswith(f"{4800 / END:.1f} %: epoch 0.16, ")
    assert lines[1] == "last evaluation: epoch 0.16: test loss 0.5000, test accuracy 50.00 %"
    assert "small: another invocation continues at sample 16" in lines
    assert "phase 4: global batch 16, lr 0.05" in lines


def test_the_time_left_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    run.plan()
    # The first attempt needed 1 s for an update, the second one needs 4 s.
    run.append(line(16, 1), line(32, 2), line(48, 3, samples_per_s=4.0))
    (run.folder / "record.json").write_text(json.dumps({"attempts": [{"start_samples": 0}, {"start_samples": 32}]}))
    follower = RunFollower(run.folder, lambda: 0.0)
    list(follower.poll())
    follower.metrics.close()
    assert follower.state is not None
    to_go = follower.state.to_go()
    assert to_go is not None
    assert to_go.phase_s == pytest.approx((PLAN.schedule.phases[0].end_samples - 48) / 4)


def test_a_decision_and_the_plan_that_it_makes_are_shown(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps, terminal=True)
    run.plan()
    run.hold()
    decision = Decision(32, "plateau", "the loss has not fallen", 16, 48, 48.0, 0.05, 0.05)
    phases = [*PLAN.to_dict()["phases"], PLAN.to_dict()["phases"][-1]]

    def decide() -> None:
        replace(run.folder / "decisions.jsonl", decisions_text(None, [decision]).decode())
        run.plan(phases=phases)

    steps += [lambda: run.append(line(32, 2)), decide, wait, lambda: run.append(line(END, 19)), run.release]
    code, lines = run.watch()
    assert code == 0
    text = "\n".join(lines)
    assert f"sample 32: {decision.describe()}" in text
    assert f"1 of {len(PLAN.schedule.phases)}" in text
    assert f"1 of {len(phases)}" in text
    assert "trained by process 7 on node3" in text


def test_the_decisions_of_a_run_that_replaces_another_are_printed(
    tmp_path: Path, steps: list[Callable[[], object]]
) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.append(line(32, 2))
    run.hold()
    old, new = (Decision(32, "plateau", why, 16, 48, 48.0, 0.05, 0.05) for why in ("of the old run", "of the new run"))
    path = run.folder / "decisions.jsonl"

    def overwrite() -> None:
        for each in (path, run.metrics, run.folder / "plan.json"):
            each.unlink()

    steps += [lambda: path.write_bytes(decisions_text(None, [old])), overwrite, run.plan]
    steps += [lambda: run.append(line(32, 2)), lambda: path.write_bytes(decisions_text(None, [new]))]
    steps += [lambda: run.append(line(END, 19)), run.release]
    code, lines = run.watch()
    assert code == 0
    assert [each for each in lines if each.startswith("sample 32: ")] == [
        f"sample 32: {decision.describe()}" for decision in (old, new)
    ]


def test_a_stopped_run_is_reported_with_the_command_that_resumes_it(
    tmp_path: Path, steps: list[Callable[[], object]]
) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    run.append(line(16, 1))
    steps += [run.release]
    code, lines = run.watch()
    assert code == 75
    assert run.now_s >= GRACE_S  # another invocation of an elastic job could have followed
    assert lines[-2].endswith(
        f"stopped at epoch 0.05 of {END / NUM_TRAIN:.2f} ({1600 / END:.1f} %): no process holds its lock"
    )
    assert lines[-1] == (
        f"to resume: hvd-batchgrow train {run.folder}/job.toml --runs-dir {run.folder.parent} --resume auto"
    )


def test_a_run_whose_last_evaluation_fails_has_failed(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    error = {"attempts": [{"error": "test loss is not finite"}]}
    steps += [lambda: run.append(line(END, 19, phase=3))]
    steps += [lambda: (run.folder / "record.json").write_text(json.dumps(error)), run.release]
    code, lines = run.watch()
    assert code == 1
    assert lines[-2].endswith(
        f"failed at epoch {END / NUM_TRAIN:.2f} of {END / NUM_TRAIN:.2f} (100.0 %): test loss is not finite"
    )
    assert lines[-1].startswith("to resume after the cause is fixed: hvd-batchgrow train ")


def test_a_killed_run_is_noticed_by_the_mark_that_is_no_longer_renewed(
    tmp_path: Path, steps: list[Callable[[], object]]
) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    run.append(line(16, 1))
    steps += [run.hold, run.hold]
    code, lines = run.watch()
    assert code == 75
    assert FRESH_S < run.now_s < FRESH_S + 5
    assert "process 7 on node3 has not renewed its lock for 30 s, so it was probably killed" in lines[-2]


def test_a_mark_that_looks_old_may_be_that_of_another_clock(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    os.utime(run.lock, (1e9, 1e9))
    steps += [wait, run.hold, lambda: run.append(line(END, 19)), run.release]
    code, lines = run.watch()
    assert code == 0
    assert "waiting up to 30 s to see whether process 7 on node3 still trains it" in lines[0]


def test_damaged_files_do_not_end_watch(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    steps += [lambda: (run.folder / "plan.json").write_text("{"), lambda: run.append(line(16, 1))]
    steps += [lambda: (run.folder / "decisions.jsonl").write_text("x\n{}\n"), run.plan]
    steps += [lambda: run.append(line(END, 19)), run.release]
    code, lines = run.watch()
    assert code == 0
    assert any("decisions.jsonl: 1 fault" in each for each in lines)


def test_a_damaged_plan_that_nothing_will_replace_ends_watch(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    """The defect: watch waited forever for a plan.json that was there."""
    run = Run(tmp_path, steps)
    (run.folder / "plan.json").write_text('{"job": ')
    run.hold()
    steps += [wait, run.release]
    code, lines = run.watch()
    assert code == 1
    assert "plan.json cannot be read: " in lines[-1]


def test_a_folder_of_the_users_slurm_scripts_is_not_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slurm").mkdir()
    Path("slurm/train.sbatch").touch()
    assert main(["watch", "."]) == 1
    assert ". does not hold a run" in capsys.readouterr().err


def test_the_command_in_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, [])
    run.plan()
    run.append(line(16, 1))
    assert main(["watch", str(run.folder)]) == 75
    assert "to resume: hvd-batchgrow train " in capsys.readouterr().out
    run.append(line(END, 19, phase=3))
    assert main(["watch", str(run.folder)]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "runs" / "smal")]) == 1
    assert "smal does not hold a run; did you mean" in capsys.readouterr().err
    assert main(["watch", str(run.folder), "--line-every-s", "-1"]) == 2


def test_watch_does_not_import_torch() -> None:
    code = "import sys, hvd_batchgrow.cli.watch, hvd_batchgrow.observers.watcher; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_branches_of_a_trigger_are_shown_once(tmp_path: Path, steps: list[Callable[[], object]]) -> None:
    run = Run(tmp_path, steps)
    run.plan()
    run.hold()
    run.append(line(16, 1))

    def branch(text: str) -> None:
        with (run.folder / "branches.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "branch", "samples": 16, "text": text}) + "\n")

    branch("before watch")
    steps += [wait, lambda: branch("sample 16: training branch k = 2"), wait, lambda: branch("critical batch: 32")]
    steps += [lambda: run.append(line(END, 19, phase=3)), lambda: run.append(evaluation(END, 0.5)), run.release]
    code, lines = run.watch(line_every_s=1000.0)
    assert code == 0
    assert [text for text in lines if "branch k" in text or "critical" in text or "before" in text] == [
        "sample 16: training branch k = 2",
        "critical batch: 32",
    ]
