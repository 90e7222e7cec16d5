"""First-order terms: against the fp64 formula, against the derivative that they are, and where none are."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from op_calls import decided
from torch import Tensor
from torch.profiler import profile

from svg_ear_compile.kernels import context, ops, planning, reference
from svg_ear_compile.kernels import plan as plans
from svg_ear_compile.kernels.attention import covariance_torch, first_order
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.plan import SparsePlan, term_blocks

from .plans import random_plan

B, H, D = 2, 3, 16
SCALE = D**-0.5
CHOSEN = (True, False, True)
GRID = (4, 8, 8)


@pytest.fixture(params=[256, 3], ids=["a block each", "groups"], autouse=True)
def most_matrices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_MATRICES", request.param)


def inputs(length: int, seed: int = 0) -> list[Tensor]:
    """query, key, value [B,H,L,D] float32, whose values go with their keys."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, length, H, D, generator=random).transpose(1, 2) for _ in range(3))
    return [q, k, v + k @ torch.randn(D, D, generator=random) / 2]


def attend(query: Tensor, plan: SparsePlan, heads: tuple[bool, ...]) -> Tensor:
    out = torch.full_like(query, torch.nan)
    return first_order.attend(query, plan, SCALE, out, False, heads)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("length", [65, 300, 1000])
def test_the_output_is_the_formula_s(length: int, equal: bool) -> None:
    query, key, value = inputs(length)
    plan = random_plan(query, key, value, equal=equal, num_text=20)
    want = reference.joint_softmax(query, plan, SCALE, first_order=CHOSEN)
    torch.testing.assert_close(attend(query, plan, CHOSEN).double(), want, atol=2e-6, rtol=2e-5)
    plain = reference.joint_softmax(query, plan, SCALE)
    assert torch.equal(want[:, 1], plain[:, 1]), "the head that was not chosen"
    if length > 65:
        assert (want - plain)[:, [0, 2]].abs().max() > 1e-3, "there is something to add"


def test_masked_keys_have_no_part() -> None:
    query, key, value = inputs(300)
    valid = torch.ones(B, 300, dtype=torch.bool)
    valid[1, 130:] = False
    plan = random_plan(query, key, value, valid=valid)
    found = first_order.matrices(plan, SCALE, torch.arange(H))
    hidden = (torch.arange(300) >= plan.key_offsets[..., -1:])[..., None]
    poisoned = plan._replace(
        key=plan.key.masked_fill(hidden, torch.nan), value=plan.value.masked_fill(hidden, torch.nan)
    )
    assert torch.equal(first_order.matrices(poisoned, SCALE, torch.arange(H)), found)
    torch.testing.assert_close(
        found.double(), reference.first_order_matrices(plan, SCALE), atol=1e-6, rtol=1e-5
    )


def test_it_is_the_derivative_of_what_a_block_gives() -> None:
    """One skipped block, queries t q around 0: what is lost falls as t^2 instead of t."""
    query, key, value = inputs(64)
    plan = random_plan(query, key, value, keep=0.0, compensate=True)
    plan = plan._replace(bias=torch.full_like(plan.bias, 4.0))
    lost = []
    for t in (0.1, 0.05):
        exact = reference.dense(t * query, key, value, scale=SCALE)
        pair = [(attend(t * query, plan, heads) - exact).norm() for heads in ((False,) * H, (True,) * H)]
        lost.append(torch.stack(pair))
    (plain, first), (plain_half, first_half) = lost
    assert 1.9 < plain / plain_half < 2.1
    assert 3.6 < first / first_half < 4.4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_that_is_not_finite_spoils_no_other(bad: float) -> None:
    query, key, value = inputs(300)
    value[0, 0, 17] = bad
    plan = random_plan(query, key, value, keep=0.5)
    held = reference.kept_matrix(plan)[0, 0]  # query blocks that meet the token exactly, or do not at all
    block = int((plan.key_offsets[0, 0, 1:] <= (plan.key_order[0, 0] == 17).nonzero()).sum())
    assert held[:, block].any()
    found = first_order.matrices(plan, SCALE, torch.arange(H))
    assert found.isfinite().all()


def test_columns_after_the_last_block_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(300)
    plan = random_plan(query, key, value, equal=False, num_text=20)
    tensors = (plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids)
    blocks = plan.key_centroids.shape[2]

    def used_before(tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return tensor.new_full(size, 7.0, dtype=dtype)

    monkeypatch.setattr(Tensor, "new_empty", used_before)
    found = covariance_torch.covariances(*tensors, torch.tensor([0, 2]), blocks + 3)
    assert found[:, :, :blocks].any()
    assert not found[:, :, blocks:].any()


def test_nothing_skipped_nothing_added() -> None:
    query, key, value = inputs(300)
    plan = random_plan(query, key, value, keep=1.0)
    assert not first_order.matrices(plan, SCALE, torch.arange(H)).any()


@pytest.mark.parametrize("group", [1, 2**40])
def test_heads_in_groups_or_at_once(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(300)
    plan = random_plan(query, key, value)
    monkeypatch.setattr(first_order, "_CHUNK_BYTES", group)
    found = first_order.matrices(plan, SCALE, torch.tensor([2, 0]))
    expected = reference.first_order_matrices(plan, SCALE)[:, [2, 0]]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_query_blocks_that_skip_nothing_do_not_weaken_those_of_their_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans, "MOST_MATRICES", 1)
    query, key, value = inputs(3 * 128)
    plan = random_plan(query, key, value, keep=0.5)
    plan.bias[:, :, 1] = -torch.inf
    both = first_order.matrices(plan, SCALE, torch.arange(H))
    plan.bias[:, :, 2] = -torch.inf
    assert plan.kept_count.shape[-1] == 3 < term_blocks(3)
    one = first_order.matrices(plan, SCALE, torch.arange(H))
    alone = reference.first_order_matrices(
        plan._replace(bias=plan.bias[:, :, :1], query_centroids=plan.query_centroids[:, :, :1]), SCALE
    )
    torch.testing.assert_close(one.double(), alone, atol=1e-6, rtol=1e-5)
    assert not torch.equal(one, both)


def test_the_op_adds_them_for_the_call_s_heads() -> None:
    query, key, value = inputs(256)
    constants = SiteConstants(None, 0, False, list(GRID), "cubes", "output_error", True, 0.3, 0, 5)
    with context.active(context.RunContext(context.Decisions(strict=True))):
        plain = ops.attention(query, key, value, None, *constants)
        plan = planning.make_plan(query, key, value, None, constants)
    with context.active(decided(constants, first_order=CHOSEN)):
        out = ops.attention(query, key, value, None, *constants)
    assert torch.equal(out[:, 1], plain[:, 1])
    want = reference.joint_softmax(query, plan, SCALE, first_order=CHOSEN)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-5)
    exact = reference.dense(query, key, value)
    assert (out - exact)[:, [0, 2]].norm() < (plain - exact)[:, [0, 2]].norm()


def test_heads_that_are_not_known_all_have_them() -> None:
    query, key, value = inputs(256)
    constants = SiteConstants(None, 0, False, list(GRID), "cubes", "output_error", True, 0.3, 0, 5)
    found = []
    for heads in (None, (True,) * H, ()):
        with context.active(decided(constants, first_order=heads)):
            found.append(ops.attention(query, key, value, None, *constants))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_batch_element_without_any_key_has_matrices_of_zero() -> None:
    query, key, value = inputs(200)
    valid = torch.ones(B, 200, dtype=torch.bool)
    valid[1] = False
    found = first_order.matrices(random_plan(query, key, value, valid=valid), SCALE, torch.arange(H))
    assert found[0].any()
    assert not found[1].any()


def test_a_trial_s_matrices_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of 8 bytes for each entry that is gathered."""
    query, key, value = inputs(2048)
    plan = random_plan(query, key, value)
    blocks = torch.randint(plan.kept_count.shape[-1], (B, H, 1024))
    monkeypatch.setattr(first_order, "_CHUNK_BYTES", 1)  # a head at a time
    with profile(profile_memory=True) as profiler:
        first_order.linear(query[:, :, :1024], blocks, [plan], SCALE)
    sizes = [x.nbytes() for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    at_most = (
        4 * B * D * D * (plan.bias.shape[-1] + plan.bias.shape[2] + 1024)
    )  # the C_j, M_g and M_g of rows
    assert max(accumulate(sizes)) < 1.25 * at_most
