"""The garbage collector during imports."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from hvd_batchgrow.cli.paused_gc import paused_gc


@pytest.fixture(autouse=True)
def _collecting() -> Iterator[None]:
    gc.enable()
    yield
    gc.freeze()
    gc.enable()


def test_it_is_paused_and_then_runs_again_also_after_a_failure() -> None:
    with paused_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), paused_gc():
        raise ImportError
    assert gc.isenabled()


def test_it_stays_off_where_the_caller_has_switched_it_off() -> None:
    gc.disable()
    with paused_gc():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("is_imported", [False, True])
def test_it_skips_what_exists_after_the_first_import_of_torch_alone(
    is_imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.unfreeze()
    torch = sys.modules["torch"]
    if not is_imported:
        monkeypatch.delitem(sys.modules, "torch")
    with paused_gc():
        sys.modules["torch"] = torch
    assert (gc.get_freeze_count() > 0) == (not is_imported)
