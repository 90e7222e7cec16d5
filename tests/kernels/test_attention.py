"""The PyTorch kernels on random plans: against the float64 joint softmax of the very plan.

A fixture sets one thread. With more of them blocks are computed together, and their lists are padded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from svg_ear_compile.kernels import plan as plans
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import torch as attention
from svg_ear_compile.kernels.plan import SparsePlan, Terms, term_blocks

from .plans import random_plan

LENGTHS = [1, 63, 64, 65, 129, 1000]
B, H, D = 2, 2, 16
SCALE = D**-0.5


def inputs(length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """query, key, value [B,H,L,D], in memory [B,L,H,D]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(B, length, H, D, generator=random).to(dtype).transpose(1, 2) for _ in range(3)]


def poisoned(query: Tensor) -> Tensor:
    """An output to write into, [B,L,H,D] in memory; what is not written is seen."""
    return query.new_full((B, query.shape[2], H, D), torch.nan).transpose(1, 2)


def attend(query: Tensor, plan: SparsePlan, terms: Terms | None = None) -> Tensor:
    out = poisoned(query)
    assert attention.attend(query, plan, SCALE, out, terms=terms) is out
    return out


def together(query: Tensor, plan: SparsePlan, terms: Terms | None = None) -> Tensor:
    """attend, three blocks at a time."""
    torch.set_num_threads(3)
    out = attend(query, plan, terms)
    torch.set_num_threads(1)
    return out


def three_ops(query: Tensor, plan: SparsePlan) -> Tensor:
    exact, lse = attention.sparse_exact(query, plan, SCALE, poisoned(query))
    return attention.centroid_compensation(query, exact, lse, plan, SCALE, poisoned(query))


def assert_accurate(got: Tensor, want: Tensor, plain: Tensor, factor: float = 2) -> None:
    """At most `factor` times the error of the plain formula in the same precision, plus one rounding."""
    rounded = want.to(got.dtype)
    rounding = ((rounded + 0.3 - 0.3) - rounded).abs().max().double() + torch.finfo(got.dtype).eps
    error = (got.double() - want).abs().max()
    assert error <= factor * (plain.double() - want).abs().max() + 2 * rounding


def check(query: Tensor, plan: SparsePlan) -> None:
    """attend, sparse_exact and the three ops against the reference."""
    want = reference.joint_softmax(query, plan, SCALE)
    plain = reference.joint_softmax(query, plan, SCALE, query.dtype)
    for whole in (attend, together):
        assert_accurate(whole(query, plan), want, plain)
    # out is rounded to the dtype between the ops
    assert_accurate(three_ops(query, plan), want, plain, factor=2 if query.dtype == torch.float32 else 3)

    out, lse = attention.sparse_exact(query, plan, SCALE, poisoned(query))
    want, want_lse = reference.exact_part(query, plan, SCALE)
    assert_accurate(out, want, reference.exact_part(query, plan, SCALE, query.dtype)[0])
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    finite, (_, plain_lse) = want_lse.isfinite(), reference.exact_part(query, plan, SCALE, torch.float32)
    if finite.any():
        assert_accurate(lse[finite], want_lse[finite], plain_lse[finite])


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "length"),
    [*((torch.float32, length) for length in LENGTHS), (torch.bfloat16, 129), (torch.float16, 129)],
)
def test_joint_softmax_of_the_plan(dtype: torch.dtype, length: int, equal: bool, keep: float) -> None:
    query, key, value = inputs(length, dtype)
    plan = random_plan(query, key, value, seed=length, equal=equal, keep=keep)
    check(query, plan)
    if dtype == torch.float32:
        truth = reference.joint_softmax(query, reference.remade(plan, key, value), SCALE)
        torch.testing.assert_close(attend(query, plan).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("text_first", [True, False])
def test_text_and_masked_keys(text_first: bool, compensate: bool) -> None:
    query, key, value = inputs(300)
    valid = torch.arange(300) < torch.tensor([[250], [300]])
    plan = random_plan(
        query, key, value, equal=False, num_text=70, text_first=text_first, valid=valid, compensate=compensate
    )
    check(query, plan)


@pytest.mark.parametrize("equal", [True, False])
def test_everything_kept_is_dense(equal: bool) -> None:
    query, key, value = inputs(300)
    valid = torch.arange(300) < torch.tensor([[250], [300]])
    mask = valid[:, None, None, :]
    plan = random_plan(query, key, value, equal=equal, keep=1.0, num_text=70, valid=valid)
    want = reference.dense(query, key, value, mask)
    assert_accurate(attend(query, plan), want, reference.dense(query, key, value, mask, dtype=torch.float32))


def test_centroids_alone() -> None:
    query, key, value = inputs(200)
    plan = random_plan(query, key, value, equal=False, keep=0.0)
    check(query, plan)
    out, lse = attention.sparse_exact(query, plan, SCALE, poisoned(query))
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


def test_a_query_that_meets_nothing_gets_zero() -> None:
    query, key, value = inputs(200)
    plan = random_plan(query, key, value, keep=0.0, compensate=False)
    for out in (attend(query, plan), together(query, plan), three_ops(query, plan)):
        assert torch.equal(out, torch.zeros_like(out))


def test_large_logits() -> None:
    """Logits of about +-500, with a bias of 3 that still counts."""
    query, key, value = inputs(200)
    query, key = query * 22, key * 22
    plan = random_plan(query, key, value, equal=False)
    logits = query @ key.mT * SCALE
    assert logits.max() > 500
    assert logits.min() < -500
    check(query, plan)
    plan.key[0, 0, 7] = torch.inf
    kept = reference.kept_matrix(plan)[0, 0, :, (plan.key_offsets[0, 0, 1:] > 7).int().argmax()]
    touched = kept.repeat_interleave(plan.query_offsets[0, 0].diff())
    for whole in (attend, together):
        found = whole(query, plan).isnan().any(-1)
        assert not found[0, 0, plan.query_order[0, 0, ~touched]].any()
        assert found.any()


@pytest.mark.parametrize("most", [1, 3])
def test_first_order_terms(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_MATRICES", 4)
    query, key, value = inputs(1100)
    plan = random_plan(query, key, value)
    blocks = plan.bias.shape[2]
    group = term_blocks(blocks)
    assert group > 1
    assert blocks % group, "the last group is smaller"
    terms = Terms(torch.tensor([-1, 0]), torch.randn(B, 1, -(-blocks // group), D, D))
    torch.set_num_threads(most)
    got, without = attend(query, plan, terms), attend(query, plan)
    ones = torch.ones_like(plan.value_centroids)
    share = attend(query, plan._replace(value=torch.zeros_like(plan.value), value_centroids=ones))
    for b in range(B):
        of_block = terms.matrices[b, 0].repeat_interleave(group, dim=0)[:blocks]
        of_slot = of_block.repeat_interleave(plan.query_offsets[b, 1].diff(), dim=0)
        tokens = plan.query_order[b, 1].long()
        without[b, 1, tokens] += share[b, 1, tokens] * (query[b, 1, tokens, None] @ of_slot)[:, 0]
    torch.testing.assert_close(got, without, rtol=1e-5, atol=1e-5)


def test_duplicated_tokens() -> None:
    query, key, value = (x[:, :, :1].expand(-1, -1, 200, -1) for x in inputs(1))
    plan = random_plan(query, key, value, equal=False)
    check(query, plan)
    torch.testing.assert_close(attend(query, plan), value.contiguous())


def test_nan_stays_in_its_head() -> None:
    query, key, value = inputs(200)
    plan = random_plan(query, key, value, equal=False, seed=2)
    for whole in (attend, together, three_ops):
        check_nan_stays_in_its_head(whole, query, plan)


def check_nan_stays_in_its_head(
    whole: Callable[[Tensor, SparsePlan], Tensor], query: Tensor, plan: SparsePlan
) -> None:
    clean = whole(query, plan)
    for name in ("key", "value", "key_centroids", "value_centroids"):
        bad = getattr(plan, name).clone()
        bad[1, 0] = torch.nan
        got = whole(query, plan._replace(**{name: bad}))
        assert got[1, 0].isnan().any()
        got[1, 0] = clean[1, 0]
        assert torch.equal(got, clean)


def test_what_is_not_kept_is_not_read() -> None:
    query, key, value = inputs(1000)
    plan = random_plan(query, key, value, keep=0.05)
    clean = attend(query, plan)
    kept, sizes = reference.kept_matrix(plan), plan.key_offsets.diff(dim=-1)
    key, value = plan.key.clone(), plan.value.clone()
    unread = 0
    for b, h, j in ((~kept.any(dim=2)) & (sizes > 0)).nonzero().tolist():
        rows = slice(int(plan.key_offsets[b, h, j]), int(plan.key_offsets[b, h, j + 1]))
        key[b, h, rows], value[b, h, rows] = torch.nan, torch.nan
        unread += 1
    assert unread > 0
    used = (plan.bias > -torch.inf).any(dim=2)
    means = [x.masked_fill(~used[..., None], torch.nan) for x in (plan.key_centroids, plan.value_centroids)]
    bad = plan._replace(key=key, value=value, key_centroids=means[0], value_centroids=means[1])
    assert torch.equal(attend(query, bad), clean)
    assert torch.equal(together(query, bad), together(query, plan))


def test_skipped_blocks_cost_nothing() -> None:
    query, key, value = inputs(2000)
    plan = random_plan(query, key, value, keep=0.25)
    kept, centroids = reference.kept_matrix(plan).double(), (plan.bias > -torch.inf).double()
    queries, keys = plan.query_offsets.diff(dim=-1).double(), plan.key_offsets.diff(dim=-1).double()
    pairs = queries[..., None, :] @ (kept * keys[:, :, None] + centroids)
    with FlopCounterMode(display=False) as counter:
        attend(query, plan)
    assert counter.get_total_flops() == 4 * D * int(pairs.sum())
    with FlopCounterMode(display=False) as counter:
        together(query, plan)
    assert counter.get_total_flops() <= 1.1 * 4 * D * int(pairs.sum())


def test_same_bits_twice() -> None:
    query, key, value = inputs(500)
    plan = random_plan(query, key, value, equal=False)
    assert torch.equal(attend(query, plan), attend(query, plan))


def test_any_layout_from_several_threads() -> None:
    query, key, value = inputs(500)
    plan, found = random_plan(query, key, value), []
    once = together(query, plan)
    torch.set_num_threads(3)
    for _ in range(3):
        caller = threading.Thread(target=lambda: found.append(attend(query.mT.contiguous().mT, plan)))
        caller.start()
        found.append(attend(query, plan))
        caller.join()
    assert len(found) == 6
    for out in found:
        torch.testing.assert_close(out, once)
