"""Networks of the zoo with unusual gradients or state train on all ranks as in plain torch. `make fuzz` runs all."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.comm.ranks import Ranks
from tests.fuzz.networks import check, joined, layouts
from tests.fuzz.zoo import ENTRIES, Entry
from tests.fuzz.zoo.generated import variation

pytestmark = pytest.mark.filterwarnings("ignore")  # some networks use what torch warns about

NAMES = (
    "batch_norm_2d", "batch_norm_checkpointed_reentrant", "bfloat16_everywhere", "column_slice", "extra_state_dict",
    "freezes_a_layer_later", "hook_that_clips", "lazy_batch_norm", "moving_average_of_inputs", "reached_by_one_update",
    "spectral_norm", "thrice_checkpointed_reentrant", "unreached_by_lars",
)  # fmt: skip
SOME = [entry for entry in ENTRIES if entry.title in NAMES] + [variation(seed) for seed in (3, 6)]


@pytest.mark.parametrize("entry", SOME, ids=lambda entry: entry.title)
def test_a_network_trains_as_in_torch_on_all_ranks(entry: Entry, ranks: Ranks, tmp_path: Path) -> None:
    with joined(ranks):
        for layout in layouts(entry, ranks.size):
            verdict = check(entry, layout, ranks, tmp_path)
            assert not verdict.faults, "\n".join([str(layout), *verdict.faults, verdict.text])
