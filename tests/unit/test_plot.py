"""What the plot of a plan shows: the figure itself is measured before it is saved."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hvd_batchgrow.observers.plot import plot_plans
from hvd_batchgrow.schedule.plan import Plan
from tests.unit.test_imported_curves import COSINE
from tests.unit.test_policies import BOUNDARIES, make_plan


def drawn(plans: list[Plan], path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Plot plans, and return the figure as it was when it was saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **keywords: Any) -> None:
        save(figure, *args, **keywords)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_plans(plans, path)
    assert path.read_bytes()
    (figure,) = saved
    return figure


def texts_that_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Return the pairs of visible tick labels, of all panels, whose boxes overlap."""
    pairs = []
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        labels = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
        boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
        pairs += [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)]
    return pairs


@pytest.mark.parametrize(
    "job",
    [
        COSINE,  # 128 to 4992, with the cut phases at the limit
        {**COSINE, "num_phases": 60},
        pytest.param({**COSINE, "num_phases": 1000, "lr_schedule": "polynomial"}, marks=pytest.mark.slow),
        {**COSINE, "num_phases": 1},
        {"policy": "decay", "epochs": 9.0, "global_batch": 128},
        {"policy": "grow", **BOUNDARIES, "max_batch": 12_800},  # two decades
        {"policy": "steps", "epochs": 9.0, "batch_steps": "0:128 50K:160 100K:192 150K:224"},
        {"policy": "grow", **BOUNDARIES, "max_batch": "N/10", "warmup_epochs": 5.0},
    ],
)
def test_tick_labels_do_not_overlap(job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn([make_plan(**job)], tmp_path / "plan.png", monkeypatch)
    assert texts_that_overlap(figure) == []
    batches = [tick.label1.get_text() for tick in figure.axes[1].yaxis.get_major_ticks()]
    phases = make_plan(**job).schedule.phases
    assert {f"{max(p.global_batch for p in phases):,}", f"{min(p.global_batch for p in phases):,}"} <= set(batches)


@pytest.mark.parametrize("start_lr", [0.0, 0.02])
def test_a_warm_up_is_drawn_as_it_rises(start_lr: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect: only 0, which a log axis does not show, and the end of the warm-up were drawn, so nothing rose."""
    warmup: dict[str, Any] = {"warmup_epochs": 5.0, "warmup_start_lr": start_lr}
    plan = make_plan(policy="grow", **BOUNDARIES, max_batch="N/10", **warmup)
    figure = drawn([plan], tmp_path / "plan.png", monkeypatch)
    epochs, rates = (np.asarray(values, float) for values in figure.axes[0].lines[0].get_data())
    rising = epochs < 5
    assert rising.sum() >= 100
    assert rates[rising] == pytest.approx(start_lr + (0.1 - start_lr) * epochs[rising] / 5, rel=1e-9)
    shown = rising & (rates >= figure.axes[0].get_ylim()[0])
    assert shown.sum() >= 95
    assert np.diff(epochs[shown]).max() < 0.06
    assert rates[np.argmin(np.abs(epochs - 5))] == pytest.approx(0.1, rel=0.01)
    assert list(rates[epochs > 60.1]) == pytest.approx(
        [plan.schedule.at(int(e * 50_000)).lr for e in epochs[epochs > 60.1]]
    )


def test_a_warm_up_beyond_a_boundary_is_drawn_in_both_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate falls by 5 at epoch 60 and continues to rise up to epoch 90."""
    plan = make_plan(policy="decay", **BOUNDARIES, warmup_epochs=90.0)
    figure = drawn([plan], tmp_path / "plan.svg", monkeypatch)
    epochs, rates = (np.asarray(values, float) for values in figure.axes[0].lines[0].get_data())
    second = (epochs > 60.01) & (epochs < 90)
    assert second.sum() >= 30
    assert rates[second] == pytest.approx(0.02 * epochs[second] / 90, rel=1e-9)


def test_long_names_stay_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(policy="decay", **BOUNDARIES)
    plan = replace(plan, job=plan.job.model_copy(update={"name": "n" * 60}))
    figure = drawn([plan, plan], tmp_path / "plan.png", monkeypatch)
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width
