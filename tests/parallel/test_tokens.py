"""Whole runs of a language model on windows of a text: exact mode, resume, growth, the evaluation and the noise.

The text has T tokens, and T - 1 is not a multiple of the window, so the last window has fewer targets than the others.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.held_out import with_validation
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.tokens.token_windows import TokenWindows
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.verification.autograd_reference import PlainRun
from tests.helpers import job_tree
from tests.parallel.test_noise import weighted_noise_of
from tests.training import Recorder, StopAfter, digest, make_trainer, newest, train

HERE = "tests.parallel.test_tokens"
GPT = Path(__file__).parents[2] / "examples/language_model/gpt.py"
VOCABULARY, CONTEXT, NUM_WINDOWS, REST = 12, 6, 61, 2
NUM_TOKENS = 1 + (NUM_WINDOWS - 1) * CONTEXT + REST
pytestmark = pytest.mark.comm


def network(num_classes: int, *, double: bool = False) -> nn.Module:
    """Return the network of examples/language_model, very small."""
    spec = importlib.util.spec_from_file_location("example_gpt", GPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.gpt(num_classes, CONTEXT, layers=1, heads=2, width=8)
    return made.double() if double else made


def text(num_tokens: int) -> NDArray[np.uint16]:
    """Return a text in which the next token mostly follows from the last one."""
    generator = np.random.default_rng(5)
    steps = np.where(generator.random(num_tokens) < 0.8, 5, generator.integers(0, VOCABULARY, num_tokens))
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)


def source() -> Datasets:
    train_set, test_set = (TokenWindows(text(count), CONTEXT) for count in (NUM_TOKENS, 1 + 9 * CONTEXT + 4))
    return Datasets(train_set, test_set, VOCABULARY, (), ())


def job_of(*, group: int = 1, double: bool = False, **sections: Any) -> Job:
    """A job whose batch grows from 4 to 8 and 16 windows."""
    tree = job_tree(**{"optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0}, **sections})
    tree["data"] = {"source": "tokens", "root": "unused", "num_samples": NUM_WINDOWS}
    tree["data"] |= {"token_dtype": "uint16", "context": CONTEXT, "num_classes": VOCABULARY}
    tree["task"] = {"name": "language_model"}
    tree["model"] = {"name": f"{HERE}:network", "ghost_batch": group, "kwargs": {"double": double}}
    tree["schedule"] = {"policy": "seesaw", "epochs": 3.0, "boundaries_epochs": [1.0, 2.0], "noise_factor": 2.0}
    tree["schedule"] |= {"global_batch": 4, "max_batch": 16}
    return parse_job(tree)


EXACT = {"exact": True, "max_micro_batch": None}


@pytest.mark.parametrize("group", [1, 2])
def test_a_growing_run_in_exact_mode_is_bit_identical_on_one_rank_and_on_all_and_after_a_stop(
    ranks: Ranks, tmp_path: Path, group: int
) -> None:
    job, given = job_of(group=group, layout=EXACT), source()
    alone, _ = train(job, SingleRank(), tmp_path / f"alone-{ranks.rank}", source=given)
    assert [phase.global_batch for phase in alone.plan.schedule.phases] == [4, 8, 16]
    folder = tmp_path / "together"
    stopped, ended = train(job, ranks, folder, source=given, stop=StopAfter(20, here=ranks.rank == 0))
    assert not ended.done
    assert 0 < stopped.state.samples < alone.state.samples
    assert stopped.state.samples > alone.plan.schedule.phases[1].start_samples  # the batch has grown
    resumed, ended = train(job, ranks, folder, source=given, checkpoint=newest(ranks, folder))
    assert ended.done
    assert digest(resumed) == digest(alone)
    assert ended.evaluation is not None
    assert alone.state.evaluation is not None
    assert ended.evaluation.metrics == pytest.approx(alone.state.evaluation.metrics, rel=1e-12)


def test_a_stopped_run_resumes_bit_identically_in_the_fast_path(ranks: Ranks, tmp_path: Path) -> None:
    job, given = job_of(layout={"max_micro_batch": 3}), source()
    whole, _ = train(job, ranks, tmp_path / "whole", source=given)
    _, ended = train(job, ranks, tmp_path / "parts", source=given, stop=StopAfter(18, here=ranks.rank == 0))
    assert not ended.done
    resumed, _ = train(job, ranks, tmp_path / "parts", source=given, checkpoint=newest(ranks, tmp_path / "parts"))
    assert digest(resumed) == digest(whole)


def windows_of(ids: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets of each window, cut from the text; the last window is short."""
    tokens = torch.from_numpy(text(NUM_TOKENS).astype(np.int64))
    for k in ids.tolist():
        window = tokens[k * CONTEXT : (k + 1) * CONTEXT + 1]
        yield window[:-1], window[1:]


def mean_loss(model: nn.Module, ids: NDArray[np.int64]) -> tuple[Tensor, int]:
    """Return the sum of the losses of all tokens of some windows, without any filling, and their number."""
    losses = [cross_entropy(model(x[None])[0], y, reduction="sum") for x, y in windows_of(ids)]
    return torch.stack(losses).sum(), sum(len(y) for _, y in windows_of(ids))


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_updates_are_those_of_one_batch_of_windows_of_unequal_length(ranks: Ranks, tmp_path: Path, limit: int) -> None:
    job, given = job_of(double=True, layout={"max_micro_batch": limit}), source()
    trainer = make_trainer(job, ranks, tmp_path, source=given)
    plain = network(VOCABULARY, double=True)
    plain.load_state_dict(trainer.parts.model.state_dict())
    trainer.run(StopAfter(0, here=False))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.0)
    order, samples, short = Stream(NUM_WINDOWS, job.seed), 0, 0
    for phase in trainer.plan.schedule.phases:
        optimizer.param_groups[0]["lr"] = phase.lr
        for _ in range(phase.num_updates):
            ids = order.ids(samples, samples + phase.global_batch)
            loss, count = mean_loss(plain, ids)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
            samples += phase.global_batch
            short += count < phase.global_batch * CONTEXT
    assert samples == trainer.state.samples
    assert short == 3  # the short window is used once per epoch
    for ours, expected in zip(trainer.parts.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_updates_are_those_that_verify_compares_with(ranks: Ranks, tmp_path: Path) -> None:
    job, given = job_of(double=True), source()
    trainer, _ = train(job, ranks, tmp_path, source=given)
    states = PlainRun(job, given, torch.device("cpu")).train(trainer.plan.schedule.num_updates)
    for key, value in states[trainer.state.samples].items():
        torch.testing.assert_close(trainer.parts.model.state_dict()[key], value, rtol=1e-6, atol=1e-8)


def test_an_evaluation_is_bits_per_token_over_the_whole_text(ranks: Ranks, tmp_path: Path) -> None:
    job, recorder, given = job_of(evaluation={"batch_size": 7}), Recorder(), source()
    trainer, _ = train(job, ranks, tmp_path, recorder, source=given)
    assert isinstance(given.test, TokenWindows)
    tokens = torch.from_numpy(given.test.tokens.astype(np.int64))
    bits, right, model = 0.0, 0, trainer.parts.model.eval()
    for at in range(1, len(tokens)):
        start = (at - 1) // CONTEXT * CONTEXT  # a token is predicted from those of its window
        with torch.no_grad():
            logits = model(tokens[None, start:at])[0, -1].double()
        bits -= float(logits.log_softmax(0)[tokens[at]]) / math.log(2)
        right += int(logits.argmax() == tokens[at])
    found = recorder.evaluations[-1]
    assert found.metrics["bits_per_token"] == pytest.approx(bits / (len(tokens) - 1), rel=1e-5)
    assert found.metrics["top1"] == right / (len(tokens) - 1)
    assert found.loss == pytest.approx(found.metrics["bits_per_token"] * math.log(2), rel=1e-6)
    assert found.metrics["bits_per_token"] < 0.9 * math.log2(VOCABULARY)  # it has learned that a 5 is added


def test_validation_windows_are_evaluated_in_training(ranks: Ranks, tmp_path: Path) -> None:
    recorder, given = Recorder(), with_validation(source(), 0.1, 7)
    assert len(given.train) == NUM_WINDOWS - 7
    train(job_of(), ranks, tmp_path, recorder, source=given)
    assert [evaluation.dataset for evaluation in recorder.evaluations] == ["validation"] * 3 + ["test"]


@pytest.mark.parametrize("exact", [False, True])
def test_the_noise_is_that_of_the_tokens_of_single_windows(ranks: Ranks, tmp_path: Path, exact: bool) -> None:
    """The first update has the short window. Each pass has one window; the estimate is B times that of the update."""
    seed = next(s for s in range(99) if NUM_WINDOWS - 1 in Stream(NUM_WINDOWS, s).ids(0, 4))
    layout = EXACT if exact else {"max_micro_batch": 1}
    logs = {"logs_per_epoch": NUM_WINDOWS, "tensorboard": False}
    job = replace_seed(job_of(double=True, layout=layout, gradient_noise={"measure": True}, logging=logs), seed)
    recorder, given = Recorder(), source()
    trainer = make_trainer(job, ranks, tmp_path, recorder, source=given)
    plain = network(VOCABULARY, double=True)
    plain.load_state_dict(trainer.parts.model.state_dict())
    trainer.run(StopAfter(0, here=False))
    sums, counts = [], []
    for k in Stream(NUM_WINDOWS, seed).ids(0, 4):
        loss, count = mean_loss(plain, np.array([k]))
        sums.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))]))
        counts.append(count)
    assert sorted(counts) == [REST, CONTEXT, CONTEXT, CONTEXT]
    wanted, found = weighted_noise_of(sums, counts, [1] * len(sums)), recorder.records[0].gradient_noise["all"]
    assert found.trace == pytest.approx(wanted.trace, rel=1e-5)
    assert found.squared_norm == pytest.approx(wanted.squared_norm, rel=1e-4)
    assert recorder.records[-1].gradient_noise["all"].b_simple is not None


def replace_seed(job: Job, seed: int) -> Job:
    return job.model_copy(update={"seed": seed})


def test_one_and_more_windows_in_a_ghost_batch_are_the_same_updates(ranks: Ranks, tmp_path: Path) -> None:
    """Without batch norm γ is only a unit of distribution: the update sums the same windows."""
    trained = [train(job_of(group=g, double=True), ranks, tmp_path / str(g), source=source())[0] for g in (1, 2)]
    for ours, theirs in zip(*(trainer.parts.model.parameters() for trainer in trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
