"""What a plan gives a few queries: against the fp64 formula, in blocks of any size, where nothing is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import first_order
from svg_ear_compile.kernels.measuring import rows_torch as rows
from svg_ear_compile.kernels.plan import SparsePlan

from .plans import random_plan

B, H, L, D = 2, 3, 300, 16
SCALE = D**-0.5


def inputs(seed: int = 0) -> list[Tensor]:
    """query, key, value [B,H,L,D] float32, whose values go with their keys."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, L, H, D, generator=random).transpose(1, 2) for _ in range(3))
    return [q, k, v + k @ torch.randn(D, D, generator=random) / 2]


def some_queries(plan: SparsePlan, n: int = 37) -> tuple[Tensor, Tensor]:
    """Tokens [B,H,n], each head's own, and the query blocks that hold them."""
    random = torch.Generator().manual_seed(1)
    slots = torch.rand(B, H, L, generator=random).argsort(-1)[..., :n]
    ends = plan.query_offsets[..., None, 1:]
    return plan.query_order.gather(-1, slots).long(), (ends <= slots[..., None]).sum(-1)


def share_of_centroids(query: Tensor, plan: SparsePlan, scale: float) -> Tensor:
    """The output where all values are 0 and all of the centroids 1."""
    zeros, ones = torch.zeros_like(plan.value), torch.ones_like(plan.value_centroids)
    return reference.joint_softmax(query, plan._replace(value=zeros, value_centroids=ones), scale)[..., 0]


def check(
    query: Tensor, plan: SparsePlan, clean: SparsePlan | None = None, scale: float = SCALE
) -> tuple[Tensor, Tensor]:
    tokens, blocks = some_queries(plan)
    queries = torch.take_along_dim(query, tokens[..., None], dim=2)
    out, share = rows.planned_rows(queries, blocks, plan, scale)
    expected = reference.joint_softmax(query, clean or plan, scale)
    expected = torch.take_along_dim(expected, tokens[..., None], dim=2)
    torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=2e-5)
    expected_share = share_of_centroids(query, clean or plan, scale).gather(-1, tokens)
    torch.testing.assert_close(share.double(), expected_share, atol=5e-6, rtol=2e-5)
    return out, share


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("scale", [SCALE, -1.5])
def test_it_is_the_formula(scale: float, equal: bool, first: bool) -> None:
    query, key, value = inputs()
    plan = random_plan(query, key, value, equal=equal, num_text=20, text_first=first)
    sizes = plan.key_offsets.diff(dim=-1)
    assert equal or ((sizes == 0).any() and (sizes == 1).any() and (sizes > 64).any())
    _, share = check(query, plan, scale=scale)
    assert ((share > 0) & (share < 1)).any()


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_hidden_keys_are_not_read(equal: bool) -> None:
    query, key, value = inputs()
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[0, 130:], valid[1, ::3] = False, False
    plan = random_plan(query, key, value, equal=equal, valid=valid, num_text=20)
    hidden = (torch.arange(L) >= plan.key_offsets[..., -1:])[..., None]
    poisoned = plan._replace(
        key=plan.key.masked_fill(hidden, torch.nan), value=plan.value.masked_fill(hidden, torch.nan)
    )
    assert all(map(torch.equal, check(query, poisoned, plan), check(query, plan)))


def test_nothing_kept_and_everything_kept() -> None:
    query, key, value = inputs()
    for equal in (True, False):
        _, share = check(query, random_plan(query, key, value, equal=equal, keep=0.0))
        torch.testing.assert_close(share, torch.ones_like(share))
        _, share = check(query, random_plan(query, key, value, equal=equal, keep=1.0))
        assert not share.any()
        out, share = check(query, random_plan(query, key, value, equal=equal, keep=0.0, compensate=False))
        assert not out.any()
        assert not share.any()


def test_heads_in_groups_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs()
    plan = random_plan(query, key, value, equal=False)
    for group in (1, 4 * L * 37 * 4):
        monkeypatch.setattr(rows, "_CHUNK_BYTES", group)
        check(query, plan)


@pytest.mark.parametrize("group", [1, 2**28])
def test_the_linear_part_is_the_formula_s(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_order, "_CHUNK_BYTES", group)
    query, key, value = inputs()
    plan = random_plan(query, key, value, num_text=20)
    tokens, blocks = some_queries(plan)
    index = tokens[..., None]
    queries = torch.take_along_dim(query, index, dim=2)
    out, share = rows.planned_rows(queries, blocks, plan, SCALE)
    linear = share[..., None] * first_order.linear(queries, blocks, [plan], SCALE)[0]
    expected = reference.joint_softmax(query, plan, SCALE, first_order=(True,) * H).take_along_dim(
        index, dim=2
    )
    torch.testing.assert_close((out + linear).double(), expected, atol=5e-6, rtol=2e-5)
    assert linear.abs().max() > 1e-3, "there is something to add"
