"""Gathering into block order, and block means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.blocks import permute_torch as permute

from .plans import random_plan

LENGTHS = [1, 63, 64, 65, 129, 1000]


def case(
    length: int, equal: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x as [B,L,H,D] in memory, order, offsets, the plan's own x in block order)."""
    random = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 8, generator=random).to(dtype).transpose(1, 2)
    valid = torch.rand(2, length, generator=random) < 0.8
    plan = random_plan(x, x, x, equal=equal, valid=valid, num_text=length // 10)
    return x, plan.key_order, plan.key_offsets, plan.key


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_gather(length: int, equal: bool) -> None:
    x, order, offsets, want = case(length, equal)
    got = permute.gather(x, order, offsets)
    assert got.is_contiguous()
    assert torch.equal(got, want)
    every = permute.gather(x, order, None)
    assert torch.equal(every, torch.take_along_dim(x, order.long()[..., None], dim=2))


def test_gather_forgets_what_masked_tokens_hold() -> None:
    x, order, offsets, want = case(129, equal=True)
    masked = torch.arange(129) >= offsets[..., -1:]
    poisoned = x.clone()
    for b in range(2):
        for h in range(3):
            poisoned[b, h, order[b, h, masked[b, h]].long()] = torch.nan
    assert poisoned.isnan().any()
    assert torch.equal(permute.gather(poisoned, order, offsets), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_block_means(length: int, equal: bool, dtype: torch.dtype) -> None:
    _, _, offsets, x = case(length, equal, dtype)
    got = permute.block_means(x, offsets)
    assert got.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            for j, (first, last) in enumerate(zip(offsets[b, h], offsets[b, h, 1:], strict=False)):
                rows = x[b, h, first:last].double()
                want = rows.mean(0) if last > first else torch.zeros(8, dtype=torch.float64)
                torch.testing.assert_close(got[b, h, j].double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(got, permute.block_means(x, offsets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_blocks_that_must_be_full(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 640, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    full = (64 * torch.arange(11, dtype=torch.int32)).expand(2, 3, -1)
    want = permute.block_means(x, full)
    uneven = full.clone()
    uneven[..., 1] = 1
    some = permute.block_means(x, uneven, most=None)  # as many tokens and blocks, but of any size
    fewer = (64 * torch.arange(10, dtype=torch.int32)).expand(2, 3, -1)
    cut = permute.block_means(x[:, :, :570], fewer.clamp(max=570), most=64)
    monkeypatch.delattr(torch, "segment_reduce")
    torch.testing.assert_close(permute.block_means(x, full, most=64), want, rtol=1e-5, atol=1e-6)
    assert (some[..., 0, :] == x[..., 0, :].float()).all()
    torch.testing.assert_close(cut[..., :8, :], want[..., :8, :])


def test_block_means_of_one_large_block_and_of_none() -> None:
    x = torch.full((1, 1, 5000, 2), 0.1)
    means = permute.block_means(x, torch.tensor([[[0, 0, 5000, 5000]]], dtype=torch.int32))
    torch.testing.assert_close(means[0, 0], torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.0, 0.0]]))
    nothing = permute.block_means(x, torch.zeros(1, 1, 3, dtype=torch.int32))
    assert torch.equal(nothing, torch.zeros(1, 1, 2, 2))


def test_nan_stays_in_its_block() -> None:
    _, _, offsets, x = case(1000, equal=False)
    clean = permute.block_means(x, offsets)
    j = int(offsets[1, 2].diff().argmax())
    x[1, 2, offsets[1, 2, j]] = torch.nan
    x[0, 0, int(offsets[0, 0, -1]) :] = torch.nan  # masked slots belong to no block
    got = permute.block_means(x, offsets)
    assert got[1, 2, j].isnan().all()
    got[1, 2, j] = clean[1, 2, j]
    assert torch.equal(got, clean)
