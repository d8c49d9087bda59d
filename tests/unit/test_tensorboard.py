"""TensorBoard shows each run under its name, and each point once however often the run was killed and resumed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from hvd_batchgrow.cli import main
from hvd_batchgrow.observers.event_files import event_files
from hvd_batchgrow.observers.markdown import markdown_table
from hvd_batchgrow.observers.scalars import record_scalars
from hvd_batchgrow.observers.tensorboard import TensorBoard, chart_layout, plan_markdown
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NormLayers
from tests.helpers import small_job
from tests.unit.test_watch import PLAN, ended, evaluation, record, run, started


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def steps(folder: Path, tag: str) -> list[int]:
    """The steps of all points, in the order in which they are in the files; no reader's purge hides any."""
    return [event.step for event in read(folder).Scalars(tag)]


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    tensors = read(folder).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in tensors]


def killed(folder: Path, records: list[int], samples: int = 0) -> None:
    """An attempt that is killed after some records, in the middle of an event."""
    board = TensorBoard()
    board.on_start(started(folder, samples))
    for counter in records:
        board.on_record(record(counter))
    with event_files(folder)[-1].open("ab") as file:
        file.write(b"\x20\x00\x00\x00\x00\x00\x00\x00\x01")


def test_a_run_has_the_name_of_its_folder(tmp_path: Path) -> None:
    for name in ("first", "first-twin"):
        run(TensorBoard(), tmp_path / name, [160])
    assert set(EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Runs()) == {"first", "first-twin"}


def test_a_path_that_is_not_utf8_is_an_error_with_a_remedy(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", job, "--runs-dir", os.fsdecode(b"lat\xfc")]
    assert main([*words, "--logging.tensorboard", "true"]) == 1
    assert "TensorBoard needs a path in UTF-8; choose another --runs-dir, or" in capsys.readouterr().err
    assert main(words) == 0


def test_samples_are_the_axis_and_updates_and_hours_are_curves(tmp_path: Path) -> None:
    board = TensorBoard()
    board.on_start(started(tmp_path))
    board.on_record(replace(record(160), elapsed_s=90.0))
    board.on_record(replace(record(320), elapsed_s=180.0))
    events = read(tmp_path)
    points = {
        tag: [(e.step, round(e.value, 6)) for e in events.Scalars(f"progress/{tag}")]
        for tag in ("updates", "epoch", "hours")
    }
    assert points == {
        "updates": [(160, 10), (320, 20)],
        "epoch": [(160, round(160 / 300, 6)), (320, round(320 / 300, 6))],
        "hours": [(160, 0.025), (320, 0.05)],
    }


def test_repeated_points_exist_once_after_two_kills(tmp_path: Path) -> None:
    killed(tmp_path, [160, 320, 336, 480])
    walls = [event.wall_time for event in read(tmp_path).Scalars("train/loss")]
    killed(tmp_path, [400, 480, 560], samples=320)
    assert steps(tmp_path, "train/loss") == [160, 320, 400, 480, 560]
    run(TensorBoard(), tmp_path, [560, 640], samples=480)
    assert steps(tmp_path, "train/loss") == [160, 320, 400, 480, 560, 640]
    assert steps(tmp_path, "val/top1") == [640]
    assert [event.wall_time for event in read(tmp_path).Scalars("train/loss")][:2] == walls[:2]
    assert len(event_files(tmp_path)) == 1


def test_a_run_that_resumes_without_a_checkpoint_begins_its_curves_again(tmp_path: Path) -> None:
    killed(tmp_path, [160, 320])
    run(TensorBoard(), tmp_path, [160, 320, 480])
    assert steps(tmp_path, "train/loss") == [160, 320, 480]


def test_a_kill_between_the_new_file_and_the_removal_of_the_old_one_doubles_nothing(tmp_path: Path) -> None:
    killed(tmp_path, [160, 320])
    old = event_files(tmp_path)[0]
    content = old.read_bytes()
    killed(tmp_path, [400], samples=320)
    old.write_bytes(content)
    run(TensorBoard(), tmp_path, [480], samples=400)
    assert steps(tmp_path, "train/loss") == [160, 320, 400, 480]


def test_the_results_of_a_finished_run_exist_once_after_several_resumes(tmp_path: Path) -> None:
    run(TensorBoard(), tmp_path, [320, 688])
    for _ in range(2):
        board = TensorBoard()
        board.on_start(started(tmp_path, 688))
        board.on_end(ended(tmp_path))
    events = read(tmp_path)
    assert steps(tmp_path, "val/top1") == [688]
    tags = (EXPERIMENT_TAG, SESSION_START_INFO_TAG)
    contents = {tag: events.summary_metadata[tag].plugin_data.content for tag in tags}
    experiment = parse_experiment_plugin_data(contents[EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == [
        *("val/top1", "val/loss", "progress/updates", "progress/hours")
    ]
    shown = sorted(info.name for info in experiment.hparam_infos if info.differs)
    assert shown == ["optim.lr", "schedule.epochs", "schedule.global_batch", "schedule.policy", "seed"]
    session = parse_session_start_info_plugin_data(contents[SESSION_START_INFO_TAG])
    values = session.hparams
    assert session.group_name == "small"
    assert values["schedule.policy"].string_value == "grow"
    assert values["schedule.boundaries_epochs"].string_value == "[0.5, 1.0, 1.5]"
    assert values["optim.lr"].number_value == 0.05
    assert values["data.hflip"].bool_value is True
    assert [len(events.Tensors(tag)) for tag in tags] == [1, 1]


def test_an_unfinished_run_has_no_results(tmp_path: Path) -> None:
    board = TensorBoard()
    board.on_start(started(tmp_path))
    board.on_evaluation(evaluation(320))
    board.on_end(replace(ended(tmp_path), updates=10))  # all phases that were requested, not all of the plan
    assert EXPERIMENT_TAG not in read(tmp_path).summary_metadata


def test_plan_and_job_are_texts_and_exist_once(tmp_path: Path) -> None:
    killed(tmp_path, [160, 320])
    run(TensorBoard(), tmp_path, [480], samples=320)
    ((step, plan),) = texts(tmp_path, "plan")
    assert step == 320
    assert plan == plan_markdown(PLAN)
    ((_, job),) = texts(tmp_path, "job")
    assert "    [schedule]\n" in job
    assert '    policy = "grow"\n' in job
    assert all(line.startswith("    ") for line in job.splitlines())  # no text can end the block
    assert "weight_decay = 0.001" in job
    assert "test_fraction" not in job  # a default


def test_a_plan_in_markdown_has_a_row_a_phase() -> None:
    lines = [line for line in plan_markdown(PLAN).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(PLAN.schedule.phases)
    assert len({line.count("|") for line in lines}) == 1
    for line, phase in zip(lines[2:], PLAN.schedule.phases, strict=True):
        assert f"| {phase.num_updates:,} |" in line


def test_markdown_escapes_what_would_change_the_table() -> None:
    table = Table(title="a|b\n<script>")
    table.add_column("x*y*", justify="right")
    table.add_row("`|`")
    assert markdown_table(table) == "a\\|b \\<script\\>\n\n| x\\*y\\* |\n| ---: |\n| \\`\\|\\` |"


def test_the_layout_has_every_chart_and_a_band_only_if_the_noise_is_measured(tmp_path: Path) -> None:
    killed(tmp_path, [160])
    killed(tmp_path, [320], samples=160)
    (tensor,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    found = {category.title: [chart.title for chart in category.chart] for category in layout.category}
    assert list(found) == ["loss and results", "batch and learning rate", "noise", "performance"]
    assert found["noise"] == ["noise scale of the schedule"]
    measured = chart_layout(small_job(gradient_noise={"measure": True}))["noise"]
    assert list(measured) == ["noise scale of the schedule", "B_simple with its 95 % band"]


@pytest.mark.parametrize(("low", "high", "has_band"), [(100.0, 300.0, True), (100.0, None, False), (None, None, False)])
def test_the_band_has_equal_steps(low: float | None, high: float | None, has_band: bool) -> None:
    # TensorBoard draws no band at all if one of its three curves has a step that another lacks.
    noise = GradientNoiseScale(50.0, 0.25, 200.0, low, high)
    scalars = record_scalars(replace(record(160), gradient_noise={"all": noise}))
    band = {"noise/gradient_b_simple_low", "noise/gradient_b_simple_mid", "noise/gradient_b_simple_high"}
    assert scalars["noise/gradient_b_simple"] == 200.0
    assert scalars["batch/over_b_simple"] == 16 / 200
    assert band & set(scalars) == (band if has_band else set())


def test_the_calibration_of_norm_layers_is_drawn() -> None:
    layers = NormLayers(b_simple=150.0, micro_batches=None, factor=1.25, is_measured=False, num_units=4)
    scalars = record_scalars(replace(record(160), norm_layers=layers))
    assert (scalars["noise/norm_layers_b_simple"], scalars["noise/norm_layers_factor"]) == (150.0, 1.25)
    assert not any(name.startswith("noise/norm_layers") for name in record_scalars(record(160)))


def test_values_that_are_not_finite_are_not_drawn() -> None:
    assert "train/loss" not in record_scalars(replace(record(160), loss=float("nan")))


@pytest.mark.slow
def test_a_stopped_and_an_overwritten_run_have_the_points_of_a_run_in_one_go(job: str) -> None:
    def train(*options: str) -> list[int]:
        code = main(["train", job, "--logging.tensorboard", "true", *options])
        assert code == (75 if "--max-updates" in options else 0)
        assert len(event_files(Path("runs/small"))) == 1
        return steps(Path("runs/small"), "train/loss")

    whole = train()
    assert sorted(set(whole)) == whole
    assert len(whole) > 5
    stopped = train("--overwrite", "--max-updates", "9")
    assert len(stopped) < len(whole)
    resumed = train("--resume", "auto")
    assert sorted(set(resumed)) == resumed
    assert set(resumed) == {*whole, *stopped}  # a stop ends a window early
    assert train("--resume", "auto") == resumed
    assert train("--overwrite") == whole
