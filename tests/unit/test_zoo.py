"""Networks of the zoo, each in one layout, train as in plain torch or are rejected. `make fuzz` runs all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.update.gradients import GradientBuckets
from tests.fuzz import reference
from tests.fuzz.networks import ALONE, check, layouts
from tests.fuzz.zoo import ENTRIES, Entry
from tests.fuzz.zoo.generated import variation

pytestmark = pytest.mark.filterwarnings("ignore")  # some networks use what torch warns about

QUICK = [entry for entry in ENTRIES if entry.quick]


@pytest.mark.slow  # half a minute for all networks together
@pytest.mark.parametrize(("place", "entry"), list(enumerate(QUICK)), ids=[entry.title for entry in QUICK])
def test_a_network_trains_as_in_torch_or_is_rejected_in_one_line(place: int, entry: Entry, tmp_path: Path) -> None:
    some = layouts(entry, 1)
    verdict = check(entry, some[place % len(some)], SingleRank(), tmp_path)
    assert not verdict.faults, "\n".join([*verdict.faults, verdict.text])


@pytest.mark.parametrize("seed", range(5))
def test_a_generated_network_trains_as_in_torch(seed: int, tmp_path: Path) -> None:
    verdict = check(variation(seed), ALONE[seed % len(ALONE)], SingleRank(), tmp_path)
    assert verdict.outcome == "equal", "\n".join([*verdict.faults, verdict.text])


def test_the_zoo_has_what_torch_trains_and_what_must_be_rejected() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert sum(not entry.refused for entry in ENTRIES) >= 60
    assert sum(bool(entry.refused) for entry in ENTRIES) >= 40


def entry_of(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.title == name)


def test_the_comparison_sees_another_weight_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "DECAY", 0.011)
    verdict = check(entry_of("deep"), ALONE[0], SingleRank(), tmp_path)
    assert verdict.outcome == "wrong"
    assert any("differs by" in fault for fault in verdict.faults)


def test_the_comparison_sees_decay_of_weights_that_no_loss_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientBuckets, "_hide_unreached", lambda self: None)
    verdict = check(entry_of("unreached"), ALONE[0], SingleRank(), tmp_path)
    assert [fault.split()[0] for fault in verdict.faults] == ["spare.weight"]


def test_the_comparison_sees_a_network_that_must_be_rejected_and_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_batchgrow.nn.own_network.gradient_fault", lambda model, example: None)
    verdict = check(entry_of("hook_that_clips"), ALONE[0], SingleRank(), tmp_path)
    assert "must be rejected" in verdict.faults[0]
