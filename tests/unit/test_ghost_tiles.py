from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hvd_batchgrow.nn.ghost
from hvd_batchgrow.nn.ghost import ghost_choice, ghost_cpu, ghost_reference
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.ghost.ghost_tiles import choose_tiles, fits, power_of_two


@given(
    num_values=st.integers(2, 2**24),
    num_channels=st.integers(1, 4096),
    num_pixels=st.sampled_from([1, 4, 49, 1024, 12544]),
    value_bytes=st.sampled_from([2, 4]),
)
def test_tiles_cover_a_ghost_batch_and_no_tile_begins_beyond_it(
    num_values: int, num_channels: int, num_pixels: int, value_bytes: int
) -> None:
    tiles = choose_tiles(num_values, num_channels, num_pixels, value_bytes)
    split = tiles.num_values * tiles.num_per_program
    assert split * (tiles.num_splits - 1) < num_values <= split * tiles.num_splits
    for size in (tiles.num_values, tiles.num_channels, tiles.num_warps):
        assert size == power_of_two(size)
    assert tiles.num_values * tiles.num_channels <= 2**14, "32 registers for each of 512 threads"
    assert tiles.num_splits <= 64
    assert tiles.num_splits == 1 or 2 * tiles.num_splits <= 0.25 * num_values / tiles.num_splits
    assert tiles.num_channels < 2 * num_channels
    assert tiles.num_warps <= 16


@pytest.mark.parametrize(
    ("num_values", "num_pixels", "is_whole"),
    [
        (32 * 8 * 8, 64, True),
        (32 * 8 * 8, 1, True),  # channels_last
        (32 * 7 * 7, 1, True),
        (32 * 32 * 32, 1024, False),
        (32 * 32 * 32, 1, False),
    ],
)
def test_small_maps_are_read_once_and_large_ones_fill_a_gpu(num_values: int, num_pixels: int, is_whole: bool) -> None:
    # 256 samples in ghost batches of 32, 64 channels, float32; an H100 has 132 multiprocessors.
    tiles = choose_tiles(num_values, 64, num_pixels, 4)
    assert (tiles.num_splits == 1) == is_whole
    num_programs = 8 * 64 // tiles.num_channels * tiles.num_splits
    assert num_programs >= (128 if is_whole else 8 * 128)


def test_offsets_beyond_32_bits_use_pytorch() -> None:
    assert fits(32 * 64 * 112 * 112)
    assert not fits(2**31)


@pytest.mark.parametrize(("dtype", "num_ghost_batches"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 2)])
def test_unsupported_types_use_pytorch(dtype: torch.dtype, num_ghost_batches: int) -> None:
    assert ghost_choice.choose(torch.zeros(4, 2, dtype=dtype), num_ghost_batches) is ghost_reference.normalize


def test_by_pytorch_only_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, of_triton = torch.device("cuda", 0), ghost_cpu.normalize
    monkeypatch.setitem(ghost_choice._found, gpu, of_triton)
    x = SimpleNamespace(device=gpu, dtype=torch.float16, numel=lambda: 8)
    for error in (None, ValueError):
        with nullcontext() if error is None else pytest.raises(error), ghost_choice.by_pytorch_only():
            assert ghost_choice.choose(x, 2) is ghost_reference.normalize  # type: ignore[arg-type]
            if error:
                raise error
        assert ghost_choice.choose(x, 2) is of_triton  # type: ignore[arg-type]


def test_without_triton_pytorch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost_choice, "find_spec", lambda _: None)
    assert ghost_choice._find(torch.device("cuda", 0)) is ghost_reference.normalize


@pytest.mark.parametrize("works", [False, True])
def test_a_triton_that_cannot_build_kernels_is_replaced_with_a_warning(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def normalize(x: torch.Tensor, *_: object) -> None:
        assert len(x) == 2
        if not works:
            raise RuntimeError("no compiler")

    triton = SimpleNamespace(normalize=normalize)
    monkeypatch.setattr(ghost_choice, "find_spec", lambda _: triton)
    monkeypatch.setattr(hvd_batchgrow.nn.ghost, "ghost_triton", triton, raising=False)
    warning = pytest.warns(
        UserWarning, match=r"cannot be built here .RuntimeError: no compiler.; it needs a C compiler"
    )
    with nullcontext() if works else warning:
        found = ghost_choice._find(torch.device("cpu"))
    assert found is (normalize if works else ghost_reference.normalize)


def test_the_norm_uses_what_is_chosen_for_one_ghost_batch_and_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(x: torch.Tensor, num_ghost_batches: int) -> ghost_choice.Normalize:
        chosen.append((len(x), num_ghost_batches))
        return ghost_reference.normalize

    monkeypatch.setattr("hvd_batchgrow.nn.ghost.ghost_batch_norm.choose", choose)
    norm = GhostBatchNorm1d(3, 2)
    for samples in (2, 6):
        norm(torch.randn(samples, 3))
    assert chosen == [(2, 1), (6, 3)]
