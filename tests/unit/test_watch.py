from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_batchgrow.comm.hardware import Hardware
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import print_plan, result_table
from hvd_batchgrow.observers.metrics import MetricsFile, evaluation_record, record_line
from hvd_batchgrow.observers.progress import ProgressDisplay, work_progress
from hvd_batchgrow.observers.progress_lines import RecentRecords
from hvd_batchgrow.observers.tensorboard import TensorBoard
from hvd_batchgrow.results.record_lines import TrainLine
from hvd_batchgrow.results.records import NOT_METRICS
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.twin import decay_twin
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.tasks.load_task import RESERVED
from hvd_batchgrow.train.events import Evaluation, Observer, RunEnded, RunStarted, TrainRecord
from tests.helpers import NUM_TRAIN, plan_text, small_job

PLAN = compile_plan(small_job(), 2, NUM_TRAIN)


HARDWARE = Hardware("NVIDIA H100 80GB HBM3", (1, 1), "NCCL 2.27.7", "13.0", "9.15.1", "580.65.06", "13.1")


def started(folder: Path, samples: int = 0, notes: tuple[str, ...] = ()) -> RunStarted:
    return RunStarted(small_job(), PLAN, folder, samples, HARDWARE, "horovod-mpi", 2, 1, "dali", 1234, notes)


def record(samples: int, phase: int = 0) -> TrainRecord:
    return TrainRecord(
        samples,
        samples / 300,
        samples / 300,
        samples // 16,
        phase,
        0.05,
        0.9,
        16,
        1,
        2,
        9.4,
        0.7,
        {"top1": 0.8},
        1000.0,
        1.0,
        2.0,
        0.0,
        3.0,
        0.01,
        0,
    )


def evaluation(samples: int) -> Evaluation:
    return Evaluation(samples, samples / 300, 0.6, {"top1": 0.75})


def ended(folder: Path, *, done: bool = True, name: str = "small") -> RunEnded:
    return RunEnded(name, folder, done, 720, 19, 19, 10.0, evaluation(720))


def run(observer: Observer, folder: Path, records: list[int], samples: int = 0) -> None:
    observer.on_start(started(folder, samples))
    for counter in records:
        observer.on_record(record(counter))
    observer.on_evaluation(evaluation(records[-1]))
    observer.on_end(ended(folder))


def test_a_resumed_run_has_no_double_lines(tmp_path: Path) -> None:
    run(MetricsFile(), tmp_path, [160, 320, 480])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "samp')  # a kill in mid-line
    run(MetricsFile(), tmp_path, [336, 480], samples=320)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["samples"]) for line in lines] == [
        ("train", 160),
        ("train", 320),
        ("train", 336),
        ("train", 480),
        ("eval", 480),
    ]
    expected = dict(vars(record(160)))
    expected |= expected.pop("metrics")  # each metric is a value of the line
    assert lines[0] == {"kind": "train", **json.loads(json.dumps(expected))}


def test_a_fresh_start_begins_the_file_again(tmp_path: Path) -> None:
    run(MetricsFile(), tmp_path, [160])
    run(MetricsFile(), tmp_path, [320])
    assert [line["samples"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [320, 320]


def test_tensorboard_has_samples_on_its_axis_and_no_double_points(tmp_path: Path) -> None:
    run(TensorBoard(), tmp_path, [160, 320, 480])
    run(TensorBoard(), tmp_path, [336, 480], samples=320)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [160, 320, 336, 480]
    assert [point.step for point in events.Scalars("val/top1")] == [480]
    tags = {
        "optim/lr",
        "optim/momentum",
        "batch/global",
        "batch/accumulation",
        "batch/ranks",
        "noise/scale",
        "lars/trust_ratio_p50",
    }
    assert tags < set(events.Tags()["scalars"])
    assert "plan/text_summary" in events.Tags()["tensors"]
    (plugin,) = {tag for tag in events.summary_metadata if "session_start_info" in tag}
    assert b"schedule.global_batch" in events.summary_metadata[plugin].plugin_data.content


def display(*, terminal: bool) -> tuple[ProgressDisplay, io.StringIO]:
    stream = io.StringIO()
    return ProgressDisplay(PlainConsole(stream, 140, is_terminal=terminal)), stream


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    shown, stream = display(terminal=False)
    shown.on_start(started(tmp_path, samples=160, notes=("skipped a checkpoint: x.pt: damaged",)))
    shown.on_record(record(176))
    shown.on_record(record(192))
    shown.on_record(record(240, phase=1))
    shown.on_evaluation(evaluation(300))
    shown.on_end(ended(tmp_path, done=False))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert (
        "network: 1,234 parameters\n"
        "device: NVIDIA H100 80GB HBM3, 1 GPU per host\n"
        "CUDA 13.0, cuDNN 9.15.1, driver 580.65.06 (up to CUDA 13.1)\n"
        "ranks: 2 on 2 hosts by Horovod over MPI; NCCL 2.27.7 sums gradients\n"
        "1 thread each, pixels by dali\n"
    ) in text
    assert "skipped a checkpoint: x.pt: damaged" in text
    assert "resumed at 160 of 688 samples" in text
    assert text.count("phase 1: global batch 16") == 1
    assert text.count("phase 2: global batch 16") == 1
    assert "epoch 1.00: B 16, lr 0.05, loss 0.7000" in text
    assert "test accuracy 75.00 %" in text
    assert (
        "small: stopped after 19 of 19 updates, 720 samples in 10 s (a checkpoint is saved): the same command with "
        "--name small --resume auto, and without --fork or --overwrite, continues" in text
    )


def test_without_a_terminal_a_line_comes_at_an_interval_with_the_time_left(tmp_path: Path) -> None:
    stream, now = io.StringIO(), [0.0]
    shown = ProgressDisplay(PlainConsole(stream, 200, is_terminal=False), 25.0, lambda: now[0])
    shown.on_start(started(tmp_path))
    for samples in range(16, 113, 16):  # each update takes 10 s: 0.8 s of work at 20 samples/s, and evaluations
        now[0] += 10.0
        shown.on_record(replace(record(samples), samples_per_s=20.0, loss=samples / 16))
    lines = [line for line in stream.getvalue().splitlines() if " %: epoch " in line]
    assert [line.split(":")[0] for line in lines] == ["7.0 %", "14.0 %"]  # at 30 s and 60 s
    # Phase 1 of 688 samples has 20 updates of 16, of which 17 are left after 3: 10 s each.
    end = PLAN.schedule.phases[0].end_samples
    assert f"; {short_time(10 * (end - 48) / 16)} in this phase, " in lines[0]
    assert lines[0].endswith(" left")
    shown.on_evaluation(evaluation(112))
    assert f"loss {sum(range(1, 8)) / 7:.4f}, 20 samples/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (125, "2:05 min"), (3599, "59:59 min"), (11220, "3:07 h")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    shown, stream = display(terminal=True)
    run(shown, tmp_path, [160, 320])
    assert "━" in stream.getvalue()
    assert "small: done: 19 of 19 updates" in stream.getvalue()


def test_a_record_of_skipped_updates_does_not_hide_the_loss_of_an_epoch() -> None:
    recent = RecentRecords()
    for loss, num_samples in ((1.0, 30), (math.nan, 60), (2.0, 10)):
        recent.add(TrainLine.of(record_line(replace(record(16), loss=loss)), "top1"), num_samples)
    assert "loss 1.2500, " in recent.text()  # (30 · 1 + 10 · 2) / 40


def test_after_lost_ranks_no_checkpoint_is_promised(tmp_path: Path) -> None:
    shown, stream = display(terminal=False)
    shown.on_end(replace(ended(tmp_path, done=False), lost_ranks=True))
    report = "small: stopped after 19 of 19 updates, 720 samples in 10 s: ranks were lost; the run continues without"
    assert report in stream.getvalue()


def test_the_plan_table_has_a_row_a_phase() -> None:
    text = plan_text(PLAN)
    for phase, layout in zip(PLAN.schedule.phases, PLAN.layouts, strict=True):
        layout_text = f"{layout.ranks} × {layout.accumulation} × {layout.micro_batch}"
        assert any(f" {phase.num_updates} " in line and layout_text in line for line in text.splitlines())
    assert f"{PLAN.num_updates} updates, 688 samples" in text


@pytest.mark.parametrize(
    ("width", "lacks"), [(100, set()), (90, {"momentum"}), (80, {"momentum", "ghost"}), (20, None)]
)
def test_a_narrow_plan_lacks_columns_and_says_so(width: int, lacks: set[str] | None) -> None:
    plan, stream = compile_plan(load_job(Path("jobs/fashion_mnist_quickstart.toml")), 1, 60_000), io.StringIO()
    print_plan(PlainConsole(stream, width), plan)
    _, text = stream.getvalue().split("\n", 1)
    table, _, dropped = text.partition("not shown at ")
    assert "…" not in text
    for phase in plan.schedule.phases:
        assert f" {phase.num_updates:,} " in table
        assert f" {phase.global_batch:,} " in table
    if lacks is not None:
        assert {word for word in ("momentum", "ghost") if word not in table} == lacks
        assert {word for word in ("momentum", "ghost") if word in dropped} == lacks
        assert dropped.startswith(f"{width} columns: ") == bool(lacks)
        assert max(map(len, table.splitlines())) <= width


def test_results_stand_side_by_side(tmp_path: Path) -> None:
    stream = io.StringIO()
    twin = RunEnded("small-twin", tmp_path, True, 672, 42, 42, 20.0, None)
    PlainConsole(stream, 140).print(result_table([("grow", ended(tmp_path)), ("decay", twin)]))
    text = stream.getvalue()
    assert "19 = 19" in text
    assert "2.21×" in text  # 42 / 19
    assert "75.00 %" in text
    assert "none" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_is_shown(terminal: bool) -> None:
    stream = io.StringIO()
    with work_progress(PlainConsole(stream, 140, is_terminal=terminal)) as report:
        for done in (0, 500_000, 1_000_000):
            report("fetching archive", done, 1_000_000)
    assert ("fetching archive: 0 of 1,000,000 bytes" in stream.getvalue()) is not terminal
    assert ("fetching archive: done, 1,000,000 bytes\n" in stream.getvalue()) is not terminal
    assert ("1,000,000 of 1,000,000 bytes" in stream.getvalue()) is terminal


def test_the_twin_is_named_after_its_job() -> None:
    assert decay_twin(small_job(), NUM_TRAIN).name == "small-twin"


def test_a_metric_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    shown, stream = display(terminal=False)
    shown.on_start(started(tmp_path))
    shown.on_evaluation(replace(evaluation(32), metrics={"top1": math.nan, "f1": 0.5}))
    assert "test top1 at sample 32: not a number: the task returned such a sum, or a count of 0" in stream.getvalue()
    shown.on_evaluation(evaluation(64))
    assert stream.getvalue().count("not a number:") == 1


def test_no_metric_may_have_the_name_of_another_value_of_a_line() -> None:
    """The names are written down where tasks and results are read, which import no trainer."""
    line, result = record_line(record(32)), evaluation_record(evaluation(32))
    assert {*line, *result} - {"top1"} == RESERVED
    assert {*result} - {"top1"} == NOT_METRICS
