"""What a plan gives a few queries, on a GPU: against the fp64 formula, the same bits twice, no waiting."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from gpu.cuda import no_waiting
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import first_order
from svg_ear_compile.kernels.plan import SparsePlan

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from plans import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LENGTH, ROWS = 1111, 200
DTYPES = [torch.float16, torch.bfloat16]


def inputs(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]; values go with their keys."""
    random = torch.Generator().manual_seed(head_dim)
    q, k, v = torch.randn(3, 2, LENGTH, 3, head_dim, generator=random)
    v = v + k @ torch.randn(head_dim, head_dim, generator=random) * (4 / head_dim**0.5)
    return tuple(x.to("cuda", dtype).transpose(1, 2) for x in (q, k, v))


def some_queries(query: Tensor, plan: SparsePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Token numbers [B,H,n,1], the queries there and their blocks."""
    random = torch.Generator().manual_seed(1)
    slots = torch.rand(2, 3, LENGTH, generator=random).argsort(-1)[..., :ROWS].cuda()
    blocks = (plan.query_offsets[..., None, 1:] <= slots[..., None]).sum(-1)
    tokens = plan.query_order.gather(-1, slots).long()[..., None]
    return tokens, torch.take_along_dim(query, tokens, dim=2), blocks


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(dtype, head_dim, equal, masked):
    triton_rows = pytest.importorskip("svg_ear_compile.kernels.measuring.rows_triton")
    query, key, value = inputs(head_dim, dtype)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 700:] = False
    clean = plan = random_plan(
        query, key, value, equal=equal, num_text=77, text_first=True, valid=valid if masked else None
    )
    if masked:
        hidden = (torch.arange(LENGTH, device="cuda") >= plan.key_offsets[..., -1:])[..., None]
        plan = plan._replace(
            key=plan.key.masked_fill(hidden, math.nan), value=plan.value.masked_fill(hidden, math.nan)
        )
    scale = head_dim**-0.5
    tokens, queries, blocks = some_queries(query, clean)
    out, share = triton_rows.planned_rows(queries, blocks, plan, scale)

    def error(found: Tensor, expected: Tensor) -> float:
        return (found.double() - expected).take_along_dim(tokens, dim=2).abs().max().item()

    expected = reference.joint_softmax(query, clean, scale)
    allowed = 2 * error(reference.joint_softmax(query, clean, scale, dtype), expected)
    assert (out - expected.take_along_dim(tokens, dim=2)).abs().max().item() <= allowed

    # The share is the output where the values of all tokens are 0, and those of the centroids 1.
    ones = clean._replace(
        value=torch.zeros_like(value), value_centroids=torch.ones_like(clean.value_centroids)
    )
    expected_share = reference.joint_softmax(query, ones, scale).take_along_dim(tokens, dim=2)[..., 0]
    assert (share - expected_share).abs().max().item() <= torch.finfo(dtype).eps

    linear = first_order.linear(queries, blocks, [plan], scale)[0]
    with_terms = reference.joint_softmax(query, clean, scale, first_order=(True,) * 3)
    added = (with_terms - expected).take_along_dim(tokens, dim=2)
    # The matrices are rounded to the input's dtype: relative to what they add.
    allowed = (1 + added.abs().max().item()) * torch.finfo(dtype).eps
    assert (share[..., None] * linear - added).abs().max().item() <= allowed
    assert added.abs().max().item() > 10 * allowed, "there is something to add"


def test_the_same_bits_twice_without_waiting():
    triton_rows = pytest.importorskip("svg_ear_compile.kernels.measuring.rows_triton")
    query, key, value = inputs(128, torch.bfloat16)
    plan = random_plan(query, key, value)
    _, queries, blocks = some_queries(query, plan)

    def both() -> tuple[Tensor, ...]:
        linear = first_order.linear(queries, blocks, [plan], 0.1)[0]
        return (*triton_rows.planned_rows(queries, blocks, plan, 0.1), linear)

    both()  # the first call compiles
    torch.cuda.synchronize()
    with no_waiting():
        first, second = both(), both()
    assert all(map(torch.equal, first, second))


def test_nothing_to_be_seen():
    triton_rows = pytest.importorskip("svg_ear_compile.kernels.measuring.rows_triton")
    query, key, value = inputs(64, torch.float16)
    plan = random_plan(query, key, value, keep=0.0, compensate=False)
    _, queries, blocks = some_queries(query, plan)
    assert not any(x.any() for x in triton_rows.planned_rows(queries, blocks, plan, 0.1))
