"""Networks with dropout, re-estimated statistics and other memory layouts: the same in every layout of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import NUM_TRAIN, job_tree
from tests.training import bytes_of, train


def trained(
    ranks: Ranks, folder: Path, num_updates: int = 6, checkpoint: Checkpoint | None = None, **sections: Any
) -> Trainer:
    """Train a few updates of 32 samples."""
    schedule = {"policy": "grow", "epochs": num_updates * 32 / NUM_TRAIN, "global_batch": 32, "boundaries_epochs": []}
    tree = job_tree(schedule=schedule, **sections)
    tree["model"] = sections["model"] if "name" in sections.get("model", {}) else tree["model"]
    return train(parse_job(tree), ranks, folder, checkpoint=checkpoint)[0]


def together_and_alone(ranks: Ranks, folder: Path, **sections: Any) -> list[str]:
    """Return the digests of the weights after the same updates on all ranks, and on one."""
    runs = [(ranks, folder / "all"), (SingleRank(), folder / f"alone{ranks.rank}")]
    return [tree_digest(trained(*run, **sections).parts.model.state_dict()) for run in runs]


def rounding_limit(num_updates: int) -> float:
    """Return the relative difference of all weights that rounding may cause in this network.

    Measured: 1e-8 to 1e-6 after one update, and up to 30 times as much after each further one.
    """
    return 1e-5 * 30.0 ** (num_updates - 1)


WRN = {"name": "wrn_10_1", "ghost_batch": 8, "dropout": 0.3}


def test_dropout_is_the_same_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    together, alone = together_and_alone(ranks, tmp_path, model=WRN, layout={"exact": True})
    assert together == alone
    without = trained(SingleRank(), tmp_path / f"{ranks.rank}", model=WRN | {"dropout": 0.0}, layout={"exact": True})
    assert tree_digest(without.parts.model.state_dict()) != alone


RESIDUAL = {"name": "wrn_10_1", "ghost_batch": 8, "shakedrop": 0.6, "classifier": "hadamard"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "precise statistics and LARS": {"model": {"precise_bn_samples": 60}, "optim": {"name": "lars", "lr": 0.5}},
    "noise of micro-batches": {"gradient_noise": {"measure": True}},
    "noise of norm layers": {"gradient_noise": {"measure": True, "estimator": "norm_layers"}},
    "ResNet with Adam": {"model": {"name": "resnet8"}, "optim": {"name": "adamw", "lr": 0.01}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_shakedrop_and_a_hadamard_classifier_are_the_same_on_any_ranks(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any]
) -> None:
    sections = {**settings, "model": RESIDUAL | settings.get("model", {}), "layout": {"exact": True}}
    together, alone = together_and_alone(ranks, tmp_path, **sections)
    assert together == alone
    others = [RESIDUAL | {"shakedrop": 0.0}, RESIDUAL | {"shakedrop": 0.5}, RESIDUAL | {"classifier": "linear"}]
    for k, other in enumerate(others if not settings else ()):
        run = trained(SingleRank(), tmp_path / f"{ranks.rank}.{k}", model=other, layout={"exact": True})
        assert tree_digest(run.parts.model.state_dict()) != alone


def test_measuring_noise_does_not_change_a_network_with_shakedrop(ranks: Ranks, tmp_path: Path) -> None:
    digests = {
        tree_digest(trained(ranks, tmp_path / f"{k}", model=RESIDUAL, **settings).parts.model.state_dict())
        for k, settings in enumerate((SETTINGS["plain"], SETTINGS["noise of norm layers"]))
    }
    assert len(digests) == 1


def test_micro_batches_do_not_decide_what_shakedrop_draws(ranks: Ranks, tmp_path: Path) -> None:
    runs = [(ranks, 16), *((SingleRank(), size) for size in (8, 16, 32))]
    weights = [
        torch.cat([p.detach().double().flatten() for p in run.parts.model.parameters()])
        for run in (
            trained(on, tmp_path / f"{k}.{on.rank}.{ranks.rank}", 1, model=RESIDUAL, layout={"max_micro_batch": size})
            for k, (on, size) in enumerate(runs)
        )
    ]
    for other in weights[1:]:
        assert float((other - weights[0]).norm() / weights[0].norm()) < rounding_limit(1)


def test_a_run_with_shakedrop_and_a_hadamard_classifier_is_resumed_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": RESIDUAL, "layout": {"exact": True}}
    whole = trained(SingleRank(), tmp_path / f"whole{ranks.rank}", **sections)
    half = bytes_of(trained(ranks, tmp_path / "half", 3, **sections).state.capture())
    assert b"classifier.scale" in half
    assert b"classifier.weight" not in half
    for name, on in (("all", ranks), (f"alone{ranks.rank}", SingleRank())):
        resumed = trained(on, tmp_path / name, checkpoint=Checkpoint.from_bytes(half), **sections)
        assert tree_digest(resumed.parts.model.state_dict()) == tree_digest(whole.parts.model.state_dict())


@pytest.mark.parametrize("exact", [False, True])
def test_reestimated_statistics_are_means_over_the_samples_seen_last(ranks: Ranks, tmp_path: Path, exact: bool) -> None:
    model = {"name": "small_conv_net", "channels": [4, 8], "ghost_batch": 8, "precise_bn_samples": 60}
    trainer = trained(ranks, tmp_path, model=model, layout={"exact": exact})
    batches = trainer.parts.ghost_batches(trainer.state.samples - 64, SingleRank())  # 60 rounded up to 8 groups
    first, *_ = ghost_norms(trainer.parts.model)
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        trainer.parts.model.eval()
        for _ in range(8):
            trainer.parts.model(batches.take(1)[0].inputs)
    groups = torch.stack(seen).double().transpose(1, 2).flatten(2)  # (8, C, values)
    torch.testing.assert_close(first.running_mean.double(), groups.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.running_var.double(), groups.var(2).mean(0), rtol=1e-5, atol=1e-6)


def test_reestimated_statistics_are_the_same_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    model = {"name": "small_conv_net", "channels": [4, 8], "ghost_batch": 8, "precise_bn_samples": 60}
    together, alone = together_and_alone(ranks, tmp_path, model=model, layout={"exact": True})
    assert together == alone


def test_channels_last_weights_are_those_of_the_other_form(ranks: Ranks, tmp_path: Path) -> None:
    runs = [trained(ranks, tmp_path / f"{last}", num_updates=2, data={"channels_last": last}) for last in (True, False)]
    last, first = (torch.cat([p.detach().flatten() for p in run.parts.model.parameters()]) for run in runs)
    convolutions = [p for p in runs[0].parts.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    assert convolutions
    assert float((last - first).norm() / first.norm()) < rounding_limit(2)


def test_the_fast_path_agrees_with_one_rank_within_the_stated_bound(ranks: Ranks, tmp_path: Path) -> None:
    for num_updates in (1, 3):
        runs = [(ranks, tmp_path / f"all{num_updates}"), (SingleRank(), tmp_path / f"{ranks.rank}of{num_updates}")]
        weights = [
            torch.cat([p.detach().double().flatten() for p in trained(*run, num_updates).parts.model.parameters()])
            for run in runs
        ]
        difference = float((weights[0] - weights[1]).norm() / weights[1].norm())
        assert difference <= rounding_limit(num_updates)


def test_exact_mode_refuses_a_network_that_draws_random_numbers(ranks: Ranks, tmp_path: Path) -> None:
    model = {"name": "tests.parallel.test_networks:draws", "ghost_batch": 8}
    with pytest.raises(CollectiveError) as failure:
        trained(ranks, tmp_path, model=model, layout={"exact": True})
    if ranks.rank == 0:
        assert f"layout.exact: is not possible with {model['name']}; at 1: random" in str(failure.value.error)
    assert trained(ranks, tmp_path, 1, model=model).parts.hazards


def draws(num_classes: int) -> torch.nn.Module:
    """A network with a dropout that is not converted."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AlphaDropout(0.1), torch.nn.Linear(64, num_classes))


# --- state that a pass changes, apart from ghost norms ---------------------------------------------


class Follows(torch.nn.Module):
    """Buffers of several types that each forward in training changes; one of them is not persistent."""

    mean: torch.Tensor
    count: torch.Tensor
    sums: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            torch.nn.Linear(64, 5),
            torch.nn.BatchNorm1d(5),
            torch.nn.Linear(5, num_classes),
        )
        self.register_buffer("mean", torch.zeros(3, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("signs", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("sums", torch.zeros(2, dtype=torch.complex128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        used = x + 0.01 * (self.mean.float().sum() + self.sums.real.float().sum())
        if self.training:
            self.mean.lerp_(x.detach()[:, :3].mean(0).bfloat16(), 0.1)
            self.count += 1
            self.signs = x.detach()[:, :5].sum(0) > 0
            self.sums -= 0.1 * torch.complex(x[0, :2].double(), x[1, :2].double()).detach()
        return self.last(self.norm(self.first(used)).relu())  # type: ignore[no-any-return]


def spectral(num_classes: int) -> torch.nn.Module:
    """Buffers with power-iteration vectors, in torch's new and old forms of spectral norm."""
    norms = torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm
    return torch.nn.Sequential(
        torch.nn.Flatten(), norms[0](torch.nn.Linear(64, 6)), torch.nn.ReLU(), norms[1](torch.nn.Linear(6, num_classes))
    )


def instances(num_classes: int) -> torch.nn.Module:
    """Instance norm with running statistics."""
    return torch.nn.Sequential(
        torch.nn.InstanceNorm2d(1, track_running_stats=True), torch.nn.Flatten(), torch.nn.Linear(64, num_classes)
    )


@pytest.mark.parametrize("name", ["Follows", "spectral", "instances"])
def test_buffers_that_training_changes_are_the_same_on_any_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    model = {"name": f"tests.parallel.test_networks:{name}", "ghost_batch": 8}
    together, alone = together_and_alone(ranks, tmp_path, model=model, layout={"exact": True})
    assert together == alone


def test_values_that_depend_on_no_sample_are_the_same_in_every_micro_batch(ranks: Ranks, tmp_path: Path) -> None:
    """In fast mode too: the vectors depend only on the weights before the update."""
    model = {"name": "tests.parallel.test_networks:spectral", "ghost_batch": 8}
    runs = [
        trained(SingleRank(), tmp_path / f"{size}.{ranks.rank}", 1, model=model, layout={"max_micro_batch": size})
        for size in (8, 16, 32)
    ]
    states = [dict(run.parts.model.named_buffers()) for run in (*runs, trained(ranks, tmp_path, 1, model=model))]
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_all_ranks_have_the_same_buffers_which_count_updates(ranks: Ranks, tmp_path: Path) -> None:
    run = trained(ranks, tmp_path, model={"name": "tests.parallel.test_networks:Follows", "ghost_batch": 8})
    assert run.parts.forward_state.buffers == ("mean", "count", "signs", "sums")
    assert int(run.parts.model.count) == run.elastic.num_updates  # type: ignore[arg-type]
    digests = torch.zeros(ranks.size, dtype=torch.int64)
    digests[ranks.rank] = int(tree_digest(dict(run.parts.model.named_buffers()))[:15], 16)
    assert len(set(ranks.all_reduce(digests, "digests of buffers").tolist())) == 1


def test_a_run_is_resumed_with_its_buffers_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    model = {"name": "tests.parallel.test_networks:Follows", "ghost_batch": 8}
    sections: dict[str, Any] = {"model": model, "layout": {"exact": True}}
    whole = trained(SingleRank(), tmp_path / f"whole{ranks.rank}", **sections)
    half = bytes_of(trained(ranks, tmp_path / "half", 3, **sections).state.capture())
    for name, on in (("all", ranks), (f"alone{ranks.rank}", SingleRank())):
        resumed = trained(on, tmp_path / name, checkpoint=Checkpoint.from_bytes(half), **sections)
        assert tree_digest(resumed.parts.model.state_dict()) == tree_digest(whole.parts.model.state_dict())
