"""The reference itself: against loops over single numbers, and against scaled_dot_product_attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.plan import SparsePlan

from .plans import random_plan


def inputs(length: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, length, 4, generator=random, dtype=torch.float64) for _ in range(3)]


def by_hand(
    query: Tensor, plan: SparsePlan, b: int, h: int, slot: int, centroids: bool
) -> tuple[list[float], float]:
    """(output, lse) of the query in one slot, as docs/DESIGN.md writes it."""
    block = next(i for i in range(plan.bias.shape[2]) if slot < plan.query_offsets[b, h, i + 1])
    token = plan.query_order[b, h, slot]

    def s(key: Tensor) -> float:
        return 0.5 * sum(float(x) * float(y) for x, y in zip(query[b, h, token], key, strict=True))

    kept = plan.kept_blocks[b, h, block, : plan.kept_count[b, h, block]].tolist()
    first, last = plan.key_offsets[b, h, :-1].tolist(), plan.key_offsets[b, h, 1:].tolist()
    slots = [t for j in kept for t in range(first[j], last[j])]
    terms = [(math.exp(s(plan.key[b, h, t])), plan.value[b, h, t]) for t in slots]
    if centroids:
        logits = [s(key) for key in plan.key_centroids[b, h]]
        weights = [math.exp(x + float(y)) for x, y in zip(logits, plan.bias[b, h, block], strict=True)]
        terms += zip(weights, plan.value_centroids[b, h], strict=True)
    total = sum(weight for weight, _ in terms)
    if total == 0:
        return [0.0] * 4, -math.inf
    return [sum(w * float(v[d]) for w, v in terms) / total for d in range(4)], math.log(total)


@pytest.mark.parametrize("compensate", [True, False])
def test_against_loops(compensate: bool) -> None:
    query, key, value = inputs(41)
    valid = torch.arange(41) < torch.tensor([[30], [41]])
    plan = random_plan(query, key, value, equal=False, num_text=3, valid=valid, compensate=compensate)
    joint = reference.joint_softmax(query, plan, scale=0.5)
    exact, lse = reference.exact_part(query, plan, scale=0.5)
    for b, h, slot in [(b, h, slot) for b in range(2) for h in range(2) for slot in range(0, 41, 4)]:
        token = plan.query_order[b, h, slot]
        want, _ = by_hand(query, plan, b, h, slot, centroids=True)
        torch.testing.assert_close(joint[b, h, token], torch.tensor(want, dtype=torch.float64))
        want, want_lse = by_hand(query, plan, b, h, slot, centroids=False)
        torch.testing.assert_close(exact[b, h, token], torch.tensor(want, dtype=torch.float64))
        assert float(lse[b, h, token]) == pytest.approx(want_lse)


@pytest.mark.parametrize("equal", [True, False])
def test_keeping_everything_is_dense(equal: bool) -> None:
    query, key, value = inputs(150)
    valid = torch.arange(150) < torch.tensor([[101], [150]])
    mask = valid[:, None, None, :]
    plan = random_plan(query, key, value, equal=equal, keep=1.0, num_text=7, valid=valid)
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(reference.dense(query, key, value, mask), want)
    torch.testing.assert_close(reference.joint_softmax(query, plan, 0.5), want)
    torch.testing.assert_close(reference.exact_part(query, plan, 0.5)[0], want)


def test_no_visible_key_gives_zeros_as_dense_does() -> None:
    query, key, value = inputs(5)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(want, torch.zeros_like(want))
    assert torch.equal(reference.dense(query, key, value, mask), want)


def test_remade_plan_shows_a_wrong_gather_and_a_wrong_mean() -> None:
    query, key, value = inputs(130)
    plan = random_plan(query, key, value, equal=False)
    want = reference.joint_softmax(query, plan, 0.5)
    torch.testing.assert_close(reference.joint_softmax(query, reference.remade(plan, key, value), 0.5), want)
    for wrong in (
        plan._replace(key=plan.key.roll(1, dims=2)),
        plan._replace(value_centroids=plan.value_centroids * 1.01),
    ):
        got = reference.joint_softmax(query, wrong, 0.5)
        truth = reference.joint_softmax(query, reference.remade(wrong, key, value), 0.5)
        assert not torch.allclose(got, truth)
