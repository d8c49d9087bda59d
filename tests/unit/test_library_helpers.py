"""The helpers for a custom training loop: PlanBatchSampler, PlanLR, evaluation, checkpoints and devices on one rank."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_batchgrow.comm.ranks import CollectiveError
from hvd_batchgrow.library import (
    Plan,
    PlanBatchSampler,
    PlanLR,
    SingleRank,
    Stream,
    choose_device,
    evaluate,
    load_checkpoint,
    plan_updates,
    save_checkpoint,
    split_batches,
)
from hvd_batchgrow.messages.errors import JobError

ROOT = Path(__file__).parents[2]
NUM_SAMPLES, SEED = 100, 3
RANKS = SingleRank()


def small_plan(ranks: int = 1, **options: Any) -> Plan:
    """16 samples per update up to sample 112, 32 up to 208, 64 up to 336."""
    growth = {
        "policy": "grow",
        "epochs": 3,
        "global_batch": 16,
        "boundaries_epochs": [1.1, 2],
        "noise_factor": 2,
        "max_batch": 64,
    }
    growth |= options.pop("schedule", {})
    values = {"lr": 0.1, "momentum": 0.9, "max_micro_batch": 16} | options
    return plan_updates(growth, num_samples=NUM_SAMPLES, ghost_batch=4, num_ranks=ranks, **values)


BATCHES = [16] * 7 + [32] * 3 + [64] * 2
STARTS = [sum(BATCHES[:k]) for k in range(len(BATCHES) + 1)]


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], **{"lr": 0.1, "momentum": 0.9, **options})


def test_the_plan_is_the_one_that_these_tests_assume() -> None:
    schedule = small_plan().schedule
    assert [schedule.at(samples).global_batch for samples in STARTS[:-1]] == BATCHES
    assert schedule.end_samples == STARTS[-1] == 336


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_yield_the_stream_update_by_update(ranks: int) -> None:
    samplers = [PlanBatchSampler(small_plan(ranks), SEED, rank, ranks, span="run") for rank in range(ranks)]
    stream = Stream(NUM_SAMPLES, SEED)
    yielded = [list(sampler) for sampler in samplers]
    for start, batch in zip(STARTS, BATCHES, strict=False):
        accumulation = -(-batch // ranks // 16)
        update = [micro_batch for batches in yielded for micro_batch in batches[:accumulation]]
        assert {len(micro_batch) for micro_batch in update} == {batch // ranks // accumulation}
        assert sorted(sum(update, [])) == sorted(stream.ids(start, start + batch).tolist())  # noqa: RUF017
        for batches in yielded:
            del batches[:accumulation]
    assert yielded == [[]] * ranks


def test_a_larger_micro_batch_grows_before_accumulation_does() -> None:
    sizes = [len(batch) for batch in PlanBatchSampler(small_plan(max_micro_batch=32), SEED, span="run")]
    assert sizes == [16] * 7 + [32] * 3 + [32, 32] * 2


def test_an_epoch_ends_at_the_first_update_that_reaches_it_and_a_phase_also_where_the_batch_changes() -> None:
    plan = small_plan()
    epochs = PlanBatchSampler(plan, SEED)
    lengths = [len([*epochs]) for _ in range(5)]
    assert lengths == [7, 3 * 2, 2 * 4, 0, 0]  # up to 112, 208 and the end, in micro-batches of 16
    # Here the phase boundary at 1.5 epochs is within an epoch: 112 + 2 · 16 = 144 is before 150, and 160 after it.
    phases = PlanBatchSampler(small_plan(schedule={"boundaries_epochs": [1.5, 2]}), SEED, span="phase")
    starts, counts, accumulation = [], [], []
    while phases.samples < phases.plan.schedule.end_samples:
        starts.append(phases.samples)
        accumulation.append(phases.accumulation)
        assert len(phases) == len([*phases.updates()]) * phases.accumulation
        counts.append(len([*phases]))
    assert starts == [0, 112, 160, 224]
    assert accumulation == [1, 1, 2, 4]
    assert counts == [7, 3, 4, 8]
    assert phases.accumulation == 4  # after the end, that of the last update


def test_the_length_is_the_number_of_micro_batches_left_in_the_span() -> None:
    for span in ("epoch", "phase", "run"):
        for start in STARTS:
            sampler = PlanBatchSampler(small_plan(), SEED, start_samples=start, span=span)
            assert len(sampler) == len([*sampler])


def test_a_loop_that_counts_the_batches_of_an_iteration_still_moves_the_sampler() -> None:
    sampler = PlanBatchSampler(small_plan(), SEED)
    first = [batch for batch, _ in zip(sampler, range(len(sampler)), strict=False)]
    assert sampler.samples == 112
    assert [*sampler] != first


def test_a_sampler_continues_from_its_state() -> None:
    whole, later = PlanBatchSampler(small_plan(), SEED, span="run"), PlanBatchSampler(small_plan(), SEED, span="run")
    later.load_state_dict({"samples": 144})
    assert later.state_dict() == {"samples": 144}
    assert [*whole][7 + 2 :] == [*later]


@pytest.mark.slow
def test_the_sampler_drives_a_loader_with_workers_that_read_ahead() -> None:
    dataset = TensorDataset(torch.arange(NUM_SAMPLES))
    sampler = PlanBatchSampler(small_plan(), SEED)
    optimizer = sgd()
    scheduler = PlanLR(optimizer, small_plan(), sampler)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=1, prefetch_factor=4)
    for number, (update, batches) in enumerate(sampler.by_update(loader)):
        assert sum(len(ids) for (ids,) in batches) == update.phase.global_batch
        optimizer.step()
        scheduler.step()
        if number == 2:
            break
    assert sampler.samples == scheduler.samples == 48  # not what the worker has read ahead
    update, batches = next(sampler.by_update(loader))
    assert update.samples == 48


def test_by_update_yields_the_updates_of_its_iteration_though_workers_read_to_its_end() -> None:
    sampler = PlanBatchSampler(small_plan(), SEED)
    dataset = TensorDataset(torch.arange(NUM_SAMPLES))
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, prefetch_factor=4)
    stream, starts = Stream(NUM_SAMPLES, SEED), []
    while sampler.samples < STARTS[-1]:
        for update, batches in sampler.by_update(loader):
            starts.append(update.samples)
            ids = torch.cat([ids for (ids,) in batches]).tolist()
            wanted = stream.ids(update.samples, update.samples + update.phase.global_batch)
            assert sorted(ids) == sorted(wanted.tolist())
    assert starts == STARTS[:-1]


def test_by_update_reports_micro_batches_that_were_not_taken_or_are_missing() -> None:
    sampler = PlanBatchSampler(small_plan(), SEED, start_samples=112)
    with pytest.raises(ValueError, match="1 of the 2 micro-batches of the update at sample 112"):
        [next(batches) for _, batches in sampler.by_update(sampler)]
    sampler.set_samples(112)
    with pytest.raises(ValueError, match="1 of the 2 micro-batches of the update at sample 112"):
        [list(batches) for _, batches in sampler.by_update([[0]])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_samples": 113}, "sample counter 113 is within an update.*batch is 32; nearest.*: 112, 144"),
        ({"start_samples": 400}, "sample counter 400 is outside the run: 0 … 335"),
        ({"rank": 2, "num_ranks": 2}, "rank = 2 must be in 0 … 1"),
        ({"num_ranks": 4}, "the plan is for 2 ranks, got 4"),
        ({"plan": small_plan(1)}, "the plan is for 1 rank, got 2"),
        ({"span": "year"}, 'span = \'year\' must be "epoch", "phase" or "run"'),
    ],
)
def test_impossible_arguments_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanBatchSampler(options.pop("plan", small_plan(2)), SEED, **{"num_ranks": 2, **options})


def test_unequal_micro_batches_are_an_error_because_loops_average_their_losses() -> None:
    with pytest.raises(ValueError, match="unequal sizes"):
        PlanBatchSampler(small_plan(3, uneven_ranks=True), SEED, 0, 3)


def test_the_scheduler_follows_warm_up_batch_limit_and_momentum_with_each_groups_ratio() -> None:
    # The batch cannot grow beyond 32, so at epoch 2 the learning rate halves instead.
    plan = small_plan(schedule={"max_batch": 32, "warmup_epochs": 1}, momentum=0.8)
    weight, bias = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = PlanLR(optimizer, plan)
    expected = [0.1 * min(1, 16 * k / 100) for k in range(7)] + [0.1] * 3 + [0.05] * 3
    for lr in expected:
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, 3 * lr])
        assert scheduler.get_last_lr() == pytest.approx([lr, 3 * lr])
        assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.8]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0]
        optimizer.step()
        scheduler.step()
    assert scheduler.samples == plan.schedule.end_samples == 112 + 6 * 32
    with pytest.raises(ValueError, match="the plan ends after 13 updates \\(304 samples\\), and step"):
        scheduler.step()


def test_the_ratios_of_groups_survive_a_state_saved_before_the_first_step_of_a_warm_up_from_0() -> None:
    plan = small_plan(schedule={"warmup_epochs": 1})

    def optimizer() -> torch.optim.SGD:
        first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": 0.3}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    saved, loaded = optimizer(), optimizer()
    PlanLR(saved, plan)
    assert [group["lr"] for group in saved.param_groups] == [0, 0]
    loaded.load_state_dict(saved.state_dict())
    scheduler = PlanLR(loaded, plan)
    loaded.step()
    scheduler.step()  # 16 of the 100 samples of the warm-up
    assert [group["lr"] for group in loaded.param_groups] == pytest.approx([0.1 * 16 / 100, 0.3 * 16 / 100])
    for group in saved.param_groups:
        del group["initial_lr"]
    with pytest.raises(
        ValueError, match=r"first parameter group has lr 0, others \[0.0\]: .*load its state afterwards"
    ):
        PlanLR(saved, plan)


def test_the_scheduler_of_adam_sets_beta_1_only() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.8, 0.95), eps=1e-6)
    PlanLR(optimizer, small_plan(momentum=0.7))
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]) == ((0.7, 0.95), 1e-6)


ADAMW = {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-6}


def adamw(plan: Plan, samples: int) -> dict[str, Any]:
    """The parameter group of AdamW with the values of the update at a sample counter."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.2)
    PlanLR(optimizer, plan, PlanBatchSampler(plan, SEED, start_samples=samples))
    return optimizer.param_groups[0]


def test_a_plan_for_adam_may_have_its_rule() -> None:
    group = adamw(small_plan(momentum=None, schedule={"lr_rule": "adam"}, optim=ADAMW), 112)  # B has doubled: κ = 2
    assert group["betas"] == pytest.approx((0.9**2, 0.95**2))
    assert (group["lr"], group["eps"]) == pytest.approx((0.1 * 2**0.5, 1e-6 / 2**0.5))
    assert group["weight_decay"] == 0.2


def test_a_plan_for_adam_may_be_seesaw() -> None:
    plan = small_plan(momentum=None, schedule={"policy": "seesaw"}, optim=ADAMW)
    assert plan.schedule.at(112).global_batch == 32  # B × f, ε ÷ √f with f = 2
    assert adamw(plan, 112)["lr"] == pytest.approx(0.1 / 2**0.5)
    assert adamw(plan, 112)["betas"] == (0.9, 0.95)


def test_the_weight_decay_per_epoch_of_a_plan_may_be_constant() -> None:
    optim = ADAMW | {"weight_decay": 0.2, "weight_decay_rule": "per_epoch"}
    plan = small_plan(momentum=None, optim=optim)
    # λ ε / B stays, and B grows from 16 to 32 and 64.
    assert [adamw(plan, samples)["weight_decay"] for samples in (0, 112, 208)] == pytest.approx([0.2, 0.4, 0.8])


def test_a_plan_has_either_a_momentum_or_betas() -> None:
    with pytest.raises(ValueError, match="give momentum, or betas of Adam in optim"):
        small_plan(momentum=None)
    with pytest.raises(JobError, match=r"optim\.momentum: unknown key of 'adamw'; it belongs to sgd, lars"):
        small_plan(optim=ADAMW)


def test_a_tensor_learning_rate_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate, capturable=True)
    PlanLR(optimizer, small_plan(lr=0.4))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.4)


def test_an_optimizer_without_momentum_needs_a_plan_without_momentum() -> None:
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"Adagrad has no momentum, and the plan sets 0.9; use plan_updates"):
        PlanLR(optimizer, small_plan())
    assert PlanLR(optimizer, small_plan(momentum=0.0)).get_last_lr() == [0.1]
    assert "momentum" not in optimizer.param_groups[0]


def test_a_scheduler_continues_from_its_state_and_moves_its_sampler() -> None:
    sampler = PlanBatchSampler(small_plan(), SEED)
    scheduler = PlanLR(sgd(), small_plan(schedule={"max_batch": 32}), sampler)
    scheduler.load_state_dict({"samples": 208})
    assert scheduler.state_dict() == {"samples": 208}
    assert sampler.samples == 208
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (10, [0.05])
    with pytest.raises(ValueError, match="nearest update boundaries: 208, 240"):
        scheduler.set_samples(210)


def test_a_scheduler_starts_where_its_sampler_does_without_a_warning_of_torch() -> None:
    optimizer = sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = PlanLR(optimizer, small_plan(), PlanBatchSampler(small_plan(), SEED, start_samples=208))
        assert scheduler.samples == 208
        scheduler.step()  # a resumed loop may have made its optimizer's steps before
    assert scheduler.samples == 272


@pytest.mark.parametrize("steps", [0, 1])
def test_a_scheduler_that_does_not_count_the_updates_is_noticed(steps: int) -> None:
    sampler = PlanBatchSampler(small_plan(), SEED)
    optimizer = sgd()
    scheduler = PlanLR(optimizer, small_plan(), sampler)
    num_updates = len(list(sampler.updates()))
    assert len(list(sampler)) >= num_updates
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match=rf"had {num_updates} updates, but PlanLR.step\(\) was called {steps} times"):
        next(iter(sampler))
    sampler.set_samples(0)  # as a loop does that begins again
    assert len(list(sampler)) >= num_updates


def test_the_scheduler_counts_updates_not_epochs() -> None:
    with pytest.raises(ValueError, match="takes no epoch, got 3"):
        PlanLR(sgd(), small_plan()).step(3)


def test_evaluation_divides_sums_by_counts_and_restores_the_modes() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    network[1].eval()
    values = torch.arange(10.0)
    loader = DataLoader(TensorDataset(values), batch_sampler=split_batches(10, 4))

    def measure(network: nn.Module, batch: list[Tensor]) -> dict[str, tuple[Tensor, float]]:
        assert not torch.is_grad_enabled()
        outputs = network(batch[0])
        return {"mean": (outputs.sum(), len(outputs)), "large": ((outputs > 6).sum(), 2), "none": (torch.zeros(()), 0)}

    result = evaluate(network, loader, measure, RANKS)
    assert (result["mean"], result["large"]) == (4.5, 3 / 6)
    assert result["none"] != result["none"]  # nan
    assert [module.training for module in network] == [True, False]
    with pytest.raises(ValueError, match="no rank has a batch"):
        evaluate(network, [], measure, RANKS)


@pytest.mark.parametrize(
    ("measured", "fault"),
    [
        (
            {"iou": torch.tensor([0.3, 4.0])},
            "returned Tensor for the metric 'iou'; it must be a pair of a sum and a count",
        ),
        ({"iou": torch.tensor(0.3)}, "returned Tensor for the metric 'iou'"),
        ({"iou": 0.3}, "returned float for the metric 'iou'"),
        ({"iou": (torch.ones(3), 3)}, r"returned two values of the forms \(3,\) and int for the metric 'iou'"),
        (0.3, "returned float as metrics; they must be a dict of sums and counts"),
        (None, "returned NoneType as metrics"),
    ],
)
def test_a_measure_returns_a_sum_and_a_count(measured: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^measure {fault}"):
        evaluate(nn.Identity(), [1], lambda network, batch: measured, RANKS)


def test_batches_with_different_quantities_are_an_error() -> None:
    names = iter(["loss", "error"])
    with pytest.raises(ValueError, match=r"measure returned \['error'\] for a batch, and \['loss'\] for another"):
        evaluate(nn.Identity(), [1, 2], lambda network, batch: {next(names): (0.0, 1)}, RANKS)


@pytest.mark.parametrize(("num_samples", "batch_size", "ranks"), [(10, 4, 1), (10, 4, 2), (10, 4, 5), (16, 4, 3)])
def test_the_batches_of_all_ranks_have_each_sample_once(num_samples: int, batch_size: int, ranks: int) -> None:
    batches = [split_batches(num_samples, batch_size, rank, ranks) for rank in range(ranks)]
    ids = [id for mine in batches for batch in mine for id in batch]
    assert sorted(ids) == [*range(num_samples)]
    assert max(len(batch) for mine in batches for batch in mine) <= batch_size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_a_split_that_is_impossible_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size = 0 must be at least 1"):
        split_batches(10, 0)
    with pytest.raises(ValueError, match=r"rank = -1 must be in 0 … 0"):
        split_batches(10, 1, -1)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path, RANKS) is None
    for samples in (16, 32):
        save_checkpoint(path, {"samples": samples, "model": {"w": torch.arange(3.0)}, "note": [1, "a"]}, RANKS)
    state = load_checkpoint(path, RANKS)
    assert state
    assert torch.equal(state["model"].pop("w"), torch.arange(3.0))
    assert state == {"samples": 32, "model": {}, "note": [1, "a"]}
    assert torch.load(path)["samples"] == 32
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_scalars_of_numpy_are_saved_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    network = nn.BatchNorm1d(2)
    best = {"accuracy": np.mean([1, 0, 1, 1]), np.int64(3): [np.float32(0.5), (np.bool_(True), np.str_("a"))]}
    optimizer = torch.optim.SGD(network.parameters(), lr=np.linspace(0.0, 1.0, 5)[1])
    state = {"samples": 16, "best": best, "optimizer": optimizer.state_dict(), "model": network.state_dict()}
    save_checkpoint(path, state, RANKS)
    found = load_checkpoint(path, RANKS)
    assert found
    assert found["best"] == {"accuracy": 0.75, 3: [0.5, (True, "a")]}
    assert type(found["best"]["accuracy"]) is float
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert found["model"]._metadata == network.state_dict()._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [bytearray(b"ab"), torch.strided, torch.Size([2]), torch.per_tensor_affine])
def test_whatever_torch_reads_back_is_saved(tmp_path: Path, value: Any) -> None:
    save_checkpoint(path := tmp_path / "checkpoint.pt", {"samples": 8, "value": [value]}, RANKS)
    assert load_checkpoint(path, RANKS) == {"samples": 8, "value": [value]}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (np.arange(3), r"state\['best'\]\[1\] is a ndarray, which load_checkpoint could not read; torch.as_tensor"),
        (Path("x"), r"state\['best'\]\[1\] is a PosixPath, which load_checkpoint could not read; save tensors"),
        (defaultdict(int), r"state\['best'\]\[1\] is a defaultdict"),
        ({"rng": np.random.get_state()}, r"state\['best'\]\[1\]\['rng'\]\[1\] is a ndarray"),
        (np.longdouble(1), r"state\['best'\]\[1\] is a longdouble"),
    ],
)
def test_what_a_checkpoint_could_not_give_back_is_not_saved(tmp_path: Path, value: Any, fault: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"samples": 8}, RANKS)
    with pytest.raises(CollectiveError, match=fault):
        save_checkpoint(path, {"samples": 16, "best": [0, value]}, RANKS)
    assert load_checkpoint(path, RANKS) == {"samples": 8}


def test_a_damaged_or_foreign_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"samples": 16, "w": torch.zeros(100)}, RANKS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CollectiveError, match=r"checkpoint\.pt: damaged: its bytes do not match its SHA-256"):
        load_checkpoint(path, RANKS)
    torch.save({"samples": 16}, path)
    with pytest.raises(CollectiveError, match=r"checkpoint\.pt: cut short, or not a checkpoint"):
        load_checkpoint(path, RANKS)


def test_a_checkpoint_needs_a_sample_counter_and_a_folder(tmp_path: Path) -> None:
    for state in ({}, {"samples": -1}, {"samples": 1.5}, {"samples": True}):
        with pytest.raises(ValueError, match="must be the sample counter, a whole number >= 0"):
            save_checkpoint(tmp_path / "checkpoint.pt", state, RANKS)
    with pytest.raises(CollectiveError, match=r"missing/checkpoint\.pt cannot be written: No such file"):
        save_checkpoint(tmp_path / "missing" / "checkpoint.pt", {"samples": 0}, RANKS)


def test_a_plan_of_updates_cannot_be_adaptive() -> None:
    with pytest.raises(
        ValueError, match=r"the triggers of policy = 'adaptive' decide during a run: use another policy"
    ):
        plan_updates({"policy": "adaptive", "epochs": 2}, lr=0.1, momentum=0.9, num_samples=60, ghost_batch=4)


@pytest.mark.parametrize(
    ("schedule", "optim", "fault"),
    [
        ("policy='grow'", None, "schedule: must be a dict of keys and values, got \"policy='grow'\""),
        (["grow"], None, "schedule: must be a dict of keys and values"),
        ({"policy": "grow"}, "sgd", "optim: must be a dict of keys and values, got 'sgd'"),
    ],
)
def test_a_schedule_in_another_form_is_refused(schedule: Any, optim: Any, fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        plan_updates(schedule, optim=optim, lr=0.1, momentum=0.9, num_samples=60, ghost_batch=4)


def test_the_device_is_the_cpu_where_no_gpu_is_visible() -> None:
    assert choose_device(RANKS) == torch.device("cpu")
    with pytest.raises(CollectiveError, match="no GPU is visible"):
        choose_device(RANKS, "cuda")


def test_the_code_on_the_page_is_that_of_the_recipes() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    own_loop = page[page.index("## Keeping your own loop") : page.index("## Speed of LARS")]
    programs = re.findall(r"^```python\n(.*?)^```", own_loop, flags=re.DOTALL | re.MULTILINE)
    recipes = {line.strip() for path in ROOT.glob("examples/*/*.py") for line in path.read_text().splitlines()}
    assert len(programs) >= 5
    assert [line for text in programs for line in text.splitlines() if line.strip() not in recipes] == []
