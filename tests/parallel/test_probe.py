"""Probing with the ranks that are there: what comes back, never how long it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import ExitCode, JobError
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.probe_file import TimedSum, load_probe, save_probe
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.probe import probe_into, probe_job, update_shapes
from tests.helpers import NUM_TRAIN, measured_job, small_job, small_source, write_idx_folder
from tests.pictures import FOLDER, pictures


@pytest.fixture
def load(tmp_path: Path) -> Callable[[], Job]:
    write_idx_folder(tmp_path / "data", small_source())
    return lambda: small_job(tmp_path / "data", data={"pipeline": "torch"})


def quiet(*_: object) -> None: ...


def test_a_probe_is_on_rank_0_and_prices_the_job(ranks: Ranks, load: Callable[[], Job]) -> None:
    report: list[str] = []
    probe = probe_job(load, ranks, quiet, report.append, budget_s=0.0)
    assert report
    assert (probe is None) == (ranks.rank > 0)
    if probe is None:
        return
    (part,) = probe.measured
    assert (part.ranks, part.threads_per_rank, part.device) == (ranks.size, 1, "cpu")
    assert {(u.micro_batch, u.accumulation) for u in part.updates} == set(itertools.product((8, 16), (1, 2, 4, 8)))
    assert all(0 <= u.data_wait_s < u.seconds for u in part.updates)
    # 4 → 8 channels, 3 classes: 36 + 2·4, 288 + 2·8, 24 + 3 values
    assert probe.gradient_bytes == 4 * (36 + 8 + 288 + 16 + 24 + 3)
    assert [s.num_bytes // 4 for s in part.sums] == ([23, 93, 375, 1500] if ranks.size > 1 else [])
    batch = 16 * ranks.size
    job = small_job(schedule={"global_batch": batch, "boundaries_epochs": [], "max_batch": batch})
    (phase,) = predict(compile_plan(job, ranks.size, NUM_TRAIN), probe).phases
    assert phase.update_s > 0
    assert phase.extrapolated_from is None


@pytest.mark.parametrize(
    ("sections", "num_bytes"), [({"layout": {"exact": True}}, 8), ({"update": {"allreduce_dtype": "float16"}}, 2)]
)
def test_gradient_bytes_are_those_that_several_ranks_all_reduce(
    ranks: Ranks, tmp_path: Path, sections: dict[str, dict[str, object]], num_bytes: int
) -> None:
    write_idx_folder(tmp_path, small_source())
    layout = {"max_micro_batch": 8} | sections.get("layout", {})
    job = small_job(tmp_path, **(sections | {"data": {"pipeline": "torch"}, "layout": layout}))
    probe = probe_job(lambda: job, ranks, quiet, quiet, budget_s=0.0)
    if probe is not None:
        assert probe.gradient_bytes == num_bytes * (36 + 8 + 288 + 16 + 24 + 3)


def test_a_probe_measures_with_the_ranks_there_whatever_the_plan_wants(ranks: Ranks, tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    layout = {"grow_by": "auto", "max_micro_batch": 8}
    job = small_job(tmp_path, data={"pipeline": "torch"}, layout=layout)
    probe = probe_job(lambda: job, ranks, quiet, quiet, budget_s=0.0)
    if probe is not None:
        # one ghost batch is all that is allowed: two and four tell a pass from a sample
        assert {u.micro_batch for u in probe.measured[0].updates} == {8, 16, 32}


def test_a_job_whose_trigger_needs_two_ranks_is_probed(ranks: Ranks, tmp_path: Path) -> None:
    """A batch of 16 in micro-batches of 16 has one gradient on one rank, and tr(Σ) needs two."""
    write_idx_folder(tmp_path, small_source())
    trigger = {"name": "gradient_noise"}
    data = {"root": str(tmp_path), "pipeline": "torch"}
    job = measured_job(trigger, data=data, layout={"max_micro_batch": 16})
    with pytest.raises(JobError, match=r"layout\.max_micro_batch: 16 makes a batch of 16 one micro-batch"):
        compile_plan(job, 1, NUM_TRAIN)
    probe = probe_job(lambda: job, ranks, quiet, quiet, budget_s=0.0)
    if probe is not None:
        assert [part.ranks for part in probe.measured] == [ranks.size]


def test_photos_of_different_sizes_are_probed(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    FOLDER.make(tmp_path / "photos", pictures(16))
    data = {"source": "image_folder", "root": str(tmp_path / "photos"), "num_samples": 16, "image_size": 16}
    data |= {"pipeline": "torch", "crop_padding": 0, "hflip": False}
    schedule = {"boundaries_epochs": [], "max_batch": 8, "global_batch": 8}
    job = small_job(data=data, schedule=schedule, layout={"max_micro_batch": 8})
    probe = probe_job(lambda: job, ranks, quiet, quiet, budget_s=0.0)
    if probe is not None:
        assert probe.image_shape == (0, 0, 3)


def test_no_pass_is_larger_than_a_gpu_was_said_to_hold() -> None:
    def sizes(limit: int, *, on_cpu: bool, exact: bool = False) -> set[int]:
        job = small_job(layout={"max_micro_batch": limit, "exact": exact})
        return {micro for micro, _ in update_shapes(job, on_cpu=on_cpu)}

    assert sizes(8, on_cpu=False) == {8}
    assert sizes(8, on_cpu=True) == {8, 16, 32}
    assert sizes(8, on_cpu=True, exact=True) == {8}
    assert sizes(16 * 8, on_cpu=False) == sizes(16 * 8, on_cpu=True) == {8, 32, 64, 128}


def test_the_figures_join_those_of_other_ranks_in_the_file(
    ranks: Ranks, load: Callable[[], Job], tmp_path: Path
) -> None:
    path = tmp_path / "PROBE.json"
    first = probe_into(path, load, ranks, quiet, quiet, budget_s=0.0)
    if first is not None:
        assert load_probe(path) == first
        (part,) = first.measured
        other = part.model_copy(update={"ranks": ranks.size + 1, "sums": (TimedSum(num_bytes=4, seconds=1.0),)})
        save_probe(path, first.model_copy(update={"measured": (other,)}))
    second = probe_into(path, load, ranks, quiet, quiet, budget_s=0.0)
    if second is not None:
        assert [part.ranks for part in second.measured] == [ranks.size, ranks.size + 1]
        assert load_probe(path) == second
        assert sorted(p.name for p in tmp_path.iterdir()) == ["PROBE.json", "data"]


def test_a_damaged_file_is_reported_before_anything_is_measured(
    ranks: Ranks, load: Callable[[], Job], tmp_path: Path
) -> None:
    path = tmp_path / "PROBE.json"
    path.write_text("{")
    report: list[str] = []
    with pytest.raises(CollectiveError, match="damaged, or not a probe" if ranks.rank == 0 else "^$") as caught:
        probe_into(path, load, ranks, quiet, report.append)
    assert caught.value.code == ExitCode.FAILURE
    assert not report
    assert path.read_text() == "{"


def test_a_file_of_another_model_is_reported_before_anything_is_measured(
    ranks: Ranks, load: Callable[[], Job], tmp_path: Path
) -> None:
    path = tmp_path / "PROBE.json"
    probe_into(path, load, ranks, quiet, quiet, budget_s=0.0)
    wide = load().model_copy(update={"model": load().model.model_copy(update={"channels": (8, 8)})})
    report: list[str] = []
    match = "model.channels: is .* into a separate file" if ranks.rank == 0 else "^$"
    with pytest.raises(CollectiveError, match=match) as caught:
        probe_into(path, lambda: wide, ranks, quiet, report.append)
    assert caught.value.code == ExitCode.BAD_JOB
    assert not report


def test_a_job_that_cannot_be_planned_is_not_probed(ranks: Ranks, tmp_path: Path) -> None:
    job = small_job(tmp_path, schedule={"global_batch": 20})
    with pytest.raises(CollectiveError) as caught:
        probe_job(lambda: job, ranks, quiet, quiet)
    assert caught.value.code == ExitCode.BAD_JOB
