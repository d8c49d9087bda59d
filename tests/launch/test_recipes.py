"""The recipes of examples/: training scripts for plain Horovod, DDP, Lightning, Accelerate and transformers.

What a script does is recorded by recorder.py, from torch's own optimizer steps and data loaders.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.data.order.stream import Stream
from tests.launch.test_forms import ENVIRONMENT, FORMS

pytestmark = [pytest.mark.slow, pytest.mark.mpi]

EXAMPLES = Path(__file__).parents[2] / "examples"
RECORDER = Path(__file__).with_name("recorder.py")
SEED = 1


@dataclass(frozen=True)
class Run:
    """What all ranks of one or several invocations in a row did."""

    steps: list[list[dict[str, Any]]]
    """[rank][update] the parameter groups and sample ids of a step."""
    weights: list[list[Tensor]]
    """[rank] the parameters at the end."""

    @property
    def ids(self) -> list[list[int]]:
        """The sample ids of each update, of all ranks."""
        return [[id for step in update for id in step["ids"]] for update in zip(*self.steps, strict=True)]

    @property
    def batches(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def values(self, name: str, group: int = 0) -> list[Any]:
        """Return a value of a parameter group at each update; equal on all ranks."""
        by_rank = [[step["groups"][group][name] for step in steps] for steps in self.steps]
        assert all(values == by_rank[0] for values in by_rank)
        return by_rank[0]


@dataclass(frozen=True)
class Recipe:
    """A script, and its plan as computed by hand."""

    script: str
    form: str
    """Launcher of two ranks."""
    num_samples: int
    batches: tuple[int, ...]
    """Of each update."""
    lrs: tuple[float, ...]
    arguments: tuple[str, ...] = ()
    package: str = "torch"

    def start(
        self, folder: Path, ranks: int, *, options: Sequence[str] = (), kill_at: int = 0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*(FORMS[self.form] if ranks == 2 else []), sys.executable, str(RECORDER), str(folder / "record"),
             str(self.num_samples), str(kill_at), str(EXAMPLES / self.script), *self.arguments, *options],
            check=False, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def run(self, folder: Path, ranks: int, *options: str) -> Run:
        done = self.start(folder, ranks, options=options)
        assert done.returncode == 0, done.stderr
        records = [folder / f"record-{rank}" for rank in range(ranks)]
        steps = [json.loads(record.with_suffix(".json").read_text()) for record in records]
        return Run(steps, [torch.load(record.with_suffix(".pt")) for record in records])


# One epoch of 1000 is 63 updates of 16, up to sample 1008. The batch of 48 begins there, and that of 144, cut to 96, at
# the first update that reaches sample 1500: 1008 + 11 · 48 = 1536. A batch of 96 instead of 144 needs 2/3 of the
# learning rate. At 1536 + 16 · 96 = 3072 the batch cannot grow again, so the learning rate becomes a third.
# The warm-up reaches the full learning rate after half an epoch.
DDP = Recipe(
    "ddp/train.py",
    "torchrun",
    1000,
    (*[16] * 63, *[48] * 11, *[96] * 26),
    (*[0.03 * min(1, 16 * k / 500) for k in range(63)], *[0.03] * 11, *[0.02] * 16, *[0.02 / 3] * 10),
)
# 0.7 epochs of 1500 are 1050 samples: 66 updates of 16 end at 1056, 28 of 48 at 2400 = 1.6 epochs, 15 of 144 at 4560.
GROWN = (*[16] * 66, *[48] * 28, *[144] * 15)
RECIPES = {
    "ddp": DDP,
    "lightning-batch": Recipe(
        "lightning/train.py", "torchrun", 1500, GROWN, (0.03,) * 109, ("batch",), "lightning.pytorch"
    ),
    "lightning-accumulation": Recipe(
        "lightning/train.py", "torchrun", 1500, GROWN, (0.03,) * 109, ("accumulation",), "lightning.pytorch"
    ),
    "accelerate": Recipe("accelerate/train.py", "torchrun", 1500, GROWN, (0.003,) * 109, (), "accelerate"),
    "transformers": Recipe("transformers/train.py", "torchrun", 1500, GROWN, (0.003,) * 109, (), "transformers"),
}
# 2560 samples: 320 updates of 16 in two epochs, 80 of 64 in two more, 10 of 256 in the last.
HOROVOD = Recipe("horovod_script/after.py", "mpirun", 2560, (*[16] * 320, *[64] * 80, *[256] * 10), (0.01,) * 410)


@cache
def why_missing(package: str) -> str:
    """Return why a package cannot be imported; empty if it can."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], check=False, env=ENVIRONMENT, capture_output=True, text=True
    )
    return f"{package} cannot be imported ({done.stderr.strip().splitlines()[-1]})" if done.returncode else ""


@pytest.fixture(scope="module", params=[*RECIPES, "horovod_script"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    found = RECIPES.get(request.param, HOROVOD)
    if why := why_missing(found.package):
        pytest.skip(why)
    return found


@pytest.fixture(scope="module")
def one(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recipe.run(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recipe.run(tmp_path_factory.mktemp("two"), 2)


def test_batches_and_learning_rates_are_those_of_the_plan(recipe: Recipe, one: Run, two: Run) -> None:
    for run in (one, two):
        assert tuple(run.batches) == recipe.batches
        assert run.values("lr") == pytest.approx(list(recipe.lrs), rel=1e-9)


def test_each_sample_is_read_once_per_epoch_in_the_order_of_the_stream(recipe: Recipe, one: Run, two: Run) -> None:
    for run in (one, two):
        epochs, rest = divmod(sum(recipe.batches), recipe.num_samples)
        counts = Counter(id for ids in run.ids for id in ids)
        assert {*counts} == {*range(recipe.num_samples)}
        assert Counter(counts.values()) == Counter({epochs: recipe.num_samples - rest}) + Counter({epochs + 1: rest})
        stream, samples = Stream(recipe.num_samples, SEED), 0
        for ids in run.ids:
            assert sorted(ids) == sorted(stream.ids(samples, samples + len(ids)).tolist())
            samples += len(ids)


def test_weights_on_one_and_two_ranks_agree_to_rounding(one: Run, two: Run) -> None:
    first, second = two.weights
    for alone, here, there in zip(one.weights[0], first, second, strict=True):
        assert torch.equal(here, there)
        assert torch.allclose(alone, here, rtol=1e-4, atol=1e-5)


def test_momentum_and_weight_decay_stay_as_the_script_has_them(recipe: Recipe, two: Run) -> None:
    decay = {"accelerate/train.py": 0.01, "transformers/train.py": 0.01, "horovod_script/after.py": 1e-4}
    assert {*two.values("weight_decay")} == {decay.get(recipe.script, 1e-3)}
    if recipe is DDP:  # norms and biases are in a group without weight decay, which has the same learning rate
        assert {*two.values("weight_decay", 1)} == {0.0}
        assert two.values("lr", 1) == two.values("lr", 0)
    if decay.get(recipe.script) == 0.01:
        assert [*map(tuple, two.values("betas"))] == [(0.9, 0.999)] * len(recipe.batches)
    else:
        assert {*two.values("momentum")} == {0.9}


@pytest.mark.parametrize(
    "recipe", ["ddp", "lightning-accumulation", "accelerate", "transformers", "horovod_script"], indirect=True
)
def test_a_run_that_stops_within_an_epoch_and_resumes_ends_with_equal_weights(
    recipe: Recipe, two: Run, tmp_path: Path
) -> None:
    if (
        recipe is HOROVOD
    ):  # it saves after each epoch; the 331st update is in the third epoch, which begins at the 321st
        assert recipe.start(tmp_path, 2, kill_at=331).returncode
        before, resumed = None, recipe.run(tmp_path, 2)
        assert resumed.batches == two.batches[320:]
    else:
        before, resumed = recipe.run(tmp_path, 2, "--max-updates", "70"), recipe.run(tmp_path, 2)
        assert before.ids + resumed.ids == two.ids
        assert len(before.ids) == 70
    for now, then in zip(resumed.weights[0], two.weights[0], strict=True):
        assert torch.equal(now, then)


def test_the_horovod_script_changes_in_fewer_than_15_lines_and_then_needs_half_the_updates(tmp_path: Path) -> None:
    before, after = (
        (EXAMPLES / "horovod_script" / name).read_text().splitlines() for name in ("before.py", "after.py")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    assert 0 < len(changed) < 15, changed
    assert len(before) <= 60
    assert not [line for line in changed if "weight_decay" in line]
    plain = Recipe("horovod_script/before.py", "mpirun", 2560, (16,) * 800, (0.01,)).run(tmp_path, 1)
    assert plain.batches == [16] * 800
    assert len(HOROVOD.batches) == 410
