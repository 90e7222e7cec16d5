"""The Triton kernels under Triton's interpreter, without a GPU, against the fp64 reference and PyTorch ones.

float32 only: the interpreter's bfloat16 is wrong.
"""

from __future__ import annotations

import math

import pytest
import torch
from plans import random_plan
from torch import Tensor

from svg_ear_compile.kernels import plan as plans
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import covariance_torch as covariance
from svg_ear_compile.kernels.attention import covariance_triton as triton_covariance
from svg_ear_compile.kernels.attention import first_order
from svg_ear_compile.kernels.attention import schedule_triton as triton_schedule
from svg_ear_compile.kernels.attention import triton as triton_attention
from svg_ear_compile.kernels.blocks import permute_torch as permute
from svg_ear_compile.kernels.blocks import permute_triton as triton_permute
from svg_ear_compile.kernels.heads import on_device
from svg_ear_compile.kernels.measuring import rows_torch as rows
from svg_ear_compile.kernels.measuring import rows_triton as triton_rows
from svg_ear_compile.kernels.plan import SparsePlan, Terms
from svg_ear_compile.kernels.probe import torch as probe
from svg_ear_compile.kernels.probe import triton as triton_probe
from svg_ear_compile.kernels.routing import triton as triton_route
from svg_ear_compile.kernels.triton_configs import Config

SCALE = 0.125
ONE_BY_ONE = Config(64, 64, 64, 4, 1, 1)
PAIRS = Config(128, 64, 128, 8, 3, 2, pair=True, tma=True)
WALK = Config(32, 32, 32, 4, 2, 2)
WALK_TMA = Config(128, 64, 64, 8, 3, 3, tma=True)


def inputs(length: int, head_dim: int = 64, batch: int = 1, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]."""
    random = torch.Generator().manual_seed(length)
    x = torch.randn(3, batch, length, heads, head_dim, generator=random)
    return tuple(y.transpose(1, 2) for y in x)


def output_like(query: Tensor) -> Tensor:
    B, H, L, D = query.shape
    return torch.full((B, L, H, D), math.nan).transpose(1, 2)


def check(
    query: Tensor, plan: SparsePlan, equal: bool, config: Config, three: bool = True, atol=5e-6
) -> Tensor:
    """attend, and the two separate streams, against the reference; gives attend's output."""
    options = (not equal, config)
    out = triton_attention.attend(query, plan, SCALE, output_like(query), *options)
    expected = reference.joint_softmax(query, plan, SCALE)
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=2e-5)
    if three:
        exact, lse = triton_attention.sparse_exact(query, plan, SCALE, output_like(query), *options)
        expected_exact, expected_lse = reference.exact_part(query, plan, SCALE)
        torch.testing.assert_close(exact.double(), expected_exact, atol=atol, rtol=2e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2 * atol, rtol=1e-5)
        merged = output_like(query)
        triton_attention.centroid_compensation(query, exact, lse, plan, SCALE, merged, *options)
        torch.testing.assert_close(merged.double(), expected, atol=atol, rtol=2e-5)
    return out


@pytest.mark.parametrize(
    ("head_dim", "text", "first", "config"),
    [
        (64, 0, False, ONE_BY_ONE),
        (96, 20, True, WALK),
        (128, 140, False, PAIRS),
        pytest.param(64, 0, False, PAIRS, marks=pytest.mark.slow),
        pytest.param(64, 0, False, WALK, marks=pytest.mark.slow),
        pytest.param(96, 20, True, ONE_BY_ONE, marks=pytest.mark.slow),
        pytest.param(96, 20, True, PAIRS, marks=pytest.mark.slow),
        pytest.param(128, 140, False, ONE_BY_ONE, marks=pytest.mark.slow),
        pytest.param(128, 140, False, WALK, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equal_tiles(head_dim, text, first, config):
    query, key, value = inputs(260, head_dim, heads=2 if text == 20 else 1)
    check(query, random_plan(query, key, value, num_text=text, text_first=first), True, config)


@pytest.mark.parametrize(
    "config", [pytest.param(WALK, id="pointers", marks=pytest.mark.slow), pytest.param(WALK_TMA, id="TMA")]
)
def test_clusters(config):
    query, key, value = inputs(170, 64, heads=2)
    plan = random_plan(query, key, value, equal=False, num_text=30, text_first=True)
    assert (plan.key_offsets.diff(dim=-1) == 0).any()
    assert (plan.key_offsets.diff(dim=-1) == 1).any()
    check(query, plan, False, config)


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [(ONE_BY_ONE, 96), (PAIRS, 64), (WALK, 64), pytest.param(WALK, 96, marks=pytest.mark.slow)],
    ids=str,
)
def test_first_order_terms(config, head_dim, monkeypatch):
    monkeypatch.setattr(plans, "MOST_MATRICES", 256 if config is PAIRS else 1)
    query, key, value = inputs(150, head_dim, batch=2, heads=3)
    plan = random_plan(query, key, value, equal=config is not WALK, num_text=20)
    chosen = (True, False, True)
    heads = on_device(chosen, query.device)
    terms = Terms(heads.places, first_order.matrices(plan, SCALE, heads.numbers))
    out = triton_attention.attend(query, plan, SCALE, output_like(query), config is WALK, config, terms=terms)
    expected = reference.joint_softmax(query, plan, SCALE, first_order=chosen)
    torch.testing.assert_close(out.double(), expected, atol=5e-6, rtol=2e-5)
    plain = reference.joint_softmax(query, plan, SCALE)
    assert (expected - plain)[:, [0, 2]].abs().max() > 1e-3, "there is something to add"


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_covariances(equal, head_dim):
    query, key, value = inputs(170, head_dim, batch=2, heads=3)
    value[0, 0, 17] = math.inf
    plan = random_plan(query, key, value, equal=equal)
    heads, columns = torch.tensor([2, 0]), plan.bias.shape[-1] + 3
    arguments = plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids
    found = triton_covariance.covariances(*arguments, heads, columns)
    expected = covariance.covariances(*arguments, heads, columns)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("head_dim", "most"), [(40, 256), (40, 9), (64, 9), (64, 1)])
def test_weights_of_blocks(head_dim, most, monkeypatch):
    """Rows with much skipped, with nothing, with large logits, and next to something that is no number."""
    monkeypatch.setattr(plans, "MOST_MATRICES", most)
    query, key, value = inputs(4300, head_dim, heads=3)
    plan = random_plan(query, key, value)
    group = plans.term_blocks(plan.bias.shape[2])
    bias, keys = plan.bias.clone(), plan.key_centroids.clone()
    assert bias.shape[-1] > 64, "more than one tile"
    bias[0, 0, 3] = bias[0, 0, 4:8] = -math.inf  # one row of a group, and all of one
    bias[0, 2, 1, :70] = -math.inf
    bias[0, 0, 2] -= 300
    keys[0, 1, 5] = math.nan
    heads, columns = torch.tensor([2, 0, 1]), bias.shape[-1] + 5
    arguments = 30 * plan.query_centroids, bias, keys, heads, SCALE, columns
    found, expected = triton_covariance.weights(*arguments), covariance.weights(*arguments)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert found[0, 1, 0].any()
    assert not found[0, 1, -(-4 // group) : 8 // group].any()
    assert not found[0, 2].any()
    assert not found[..., -5:].any()


@pytest.mark.parametrize(
    ("head_dim", "n", "equal"), [(40, 45, False), (64, 7, True)], ids=["clusters", "tiles"]
)
def test_planned_rows(head_dim, n, equal):
    query, key, value = inputs(170, head_dim, batch=2, heads=3)
    valid = torch.ones(2, 170, dtype=torch.bool)
    valid[1, 100:] = False
    plan = random_plan(query, key, value, equal=equal, num_text=20, valid=valid)
    dropped = plan._replace(kept_count=0 * plan.kept_count, bias=torch.full_like(plan.bias, -math.inf))
    hidden = (torch.arange(170) >= plan.key_offsets[..., -1:])[..., None]
    # Blocks in no order.
    blocks = torch.randint(plan.bias.shape[2], (2, 3, n), generator=torch.Generator().manual_seed(n))
    for some in (plan, dropped):
        poisoned = some._replace(
            key=some.key.masked_fill(hidden, math.nan), value=some.value.masked_fill(hidden, math.nan)
        )
        found = triton_rows.planned_rows(query[:, :, :n], blocks, poisoned, -SCALE)
        expected = rows.planned_rows(query[:, :, :n], blocks, some, -SCALE)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, atol=5e-6, rtol=2e-5)
            assert y.any() == (some is plan)


def test_long_clusters():
    """One block of each size class: several tiles long, a single token, empty."""
    query, key, value = inputs(200)
    plan = random_plan(query, key, value, equal=False, keep=1.0)
    Cq, Ck = plan.bias.shape[-2:]
    query_offsets = torch.tensor([0, 1, 150] + [200] * (Cq - 2), dtype=torch.int32)
    key_offsets = torch.tensor([0, 1, 140, 199] + [200] * (Ck - 3), dtype=torch.int32)
    listed = torch.tensor([1, 3], dtype=torch.int32).expand(1, 1, Cq, 2)
    kept = torch.nn.functional.pad(listed, (0, Ck - 2), value=-1).contiguous()
    count = torch.full((1, 1, Cq), 2, dtype=torch.int32)
    bias = torch.full_like(plan.bias, -math.inf)
    bias[..., 2] = 1.5
    plan = plan._replace(
        query_offsets=query_offsets.view(1, 1, -1), key_offsets=key_offsets.view(1, 1, -1),
        kept_blocks=kept, kept_count=count, bias=bias,
    )  # fmt: skip
    check(query, plan, False, WALK)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("tma", [True, False], ids=["TMA", "pointers"])
def test_slots_of_masked_keys_are_never_read(equal, tma):
    query, key, value = inputs(150, batch=2)
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[0, 40:] = False
    valid[1, ::3] = False
    plan = random_plan(query, key, value, equal=equal, valid=valid, keep=0.6)
    config = Config(64, 64, 64, 4, 1, 1, tma=tma)
    expected = check(query, plan, equal, config, three=False)
    hidden = (torch.arange(150) >= plan.key_offsets[..., -1:])[..., None]
    poisoned = plan._replace(
        key=plan.key.masked_fill(hidden, math.nan), value=plan.value.masked_fill(hidden, math.nan)
    )
    out = triton_attention.attend(query, poisoned, SCALE, output_like(query), not equal, config)
    assert torch.equal(out, expected)


def test_large_logits():
    query, key, value = inputs(150)
    logits = query @ key.mT * SCALE
    query = query * (500 / logits.abs().max())
    # float32 knows a logit of 500 to 3e-5
    check(query, random_plan(query, key, value, keep=0.5), True, PAIRS, atol=2e-4)


def test_rows_with_nothing_kept():
    query, key, value = inputs(150)
    for equal, config in ((True, PAIRS), (False, WALK)):
        plan = random_plan(query, key, value, equal=equal, keep=0.0)
        check(query, plan, equal, config)
        plan = random_plan(query, key, value, equal=equal, keep=0.0, compensate=False)
        assert not check(query, plan, equal, config).any()


def test_everything_kept_is_dense_attention():
    query, key, value = inputs(200)
    out = check(query, random_plan(query, key, value, keep=1.0), True, PAIRS, three=False)
    torch.testing.assert_close(
        out.double(), reference.dense(query, key, value, scale=SCALE), atol=5e-6, rtol=2e-5
    )


def test_nan_stays_in_its_head():
    query, key, value = inputs(150, heads=2)
    clean = random_plan(query, key, value)
    expected = triton_attention.attend(query, clean, SCALE, output_like(query), False, PAIRS)
    for x in (query, key, value):
        before = x[0, 1, 149, 3].clone()
        x[0, 1, 149, 3] = math.nan
        plan = random_plan(query, key, value)
        out = triton_attention.attend(query, plan, SCALE, output_like(query), False, PAIRS)
        x[0, 1, 149, 3] = before
        assert out[0, 1].isnan().any()
        assert torch.equal(out[0, 0], expected[0, 0])


def test_query_of_any_strides():
    query, key, value = inputs(130)
    plan = random_plan(query, key, value)
    for strided in (
        query.mT.contiguous().mT,
        query.contiguous(),
        query[:, :, :, None].expand(-1, -1, -1, 1, -1)[:, :, :, 0],
    ):
        check(strided, plan, True, PAIRS, three=False)


def test_unsupported_is_refused():
    query, key, value = inputs(130, 64)
    plan = random_plan(query, key, value)
    with pytest.raises(ValueError, match="scale"):
        triton_attention.attend(query, plan, 0.0, output_like(query), False)
    with pytest.raises(ValueError, match="head_dim"):
        triton_attention.attend(torch.zeros(1, 1, 130, 257), plan, 1.0, output_like(query), False)


@pytest.mark.parametrize("block_m", [32, 64, 128])
def test_schedule_covers_every_query_once_heaviest_first(block_m):
    query, key, value = inputs(700, 16, heads=2)
    plan = random_plan(query, key, value, equal=False)
    blocks, firsts = triton_schedule.schedule(plan, block_m, True)
    for head in range(2):
        offsets, seen = plan.query_offsets[0, head].tolist(), []
        weights = []
        for block, first in zip(blocks[0, head].tolist(), firsts[0, head].tolist(), strict=True):
            weights.append(plan.kept_count[0, head, block].item() if block >= 0 else -1)
            if block >= 0:
                start = offsets[block] + first
                seen += range(start, min(start + block_m, offsets[block + 1]))
        assert sorted(seen) == list(range(700))
        assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("blocks", [1, 63, 130, 300])
def test_heaviest_first_is_a_stable_sort(blocks):
    random = torch.Generator().manual_seed(blocks)
    counts = torch.randint(0, 9, (2, 3, blocks), generator=random, dtype=torch.int32)
    expected = counts.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(triton_schedule.heaviest_first(counts).long(), expected)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_gather_and_means(equal):
    query, key, value = inputs(150, 96, batch=2, heads=2)
    key[0, 1, 149, 3] = math.nan
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, 40:] = False
    plan = random_plan(query, key, value, equal=equal, valid=valid, num_text=20)
    value = value.contiguous()  # strides of its own
    arguments = (key, value, plan.key_order, plan.key_offsets)
    got, expected = (f.gather_with_means(*arguments, True) for f in (triton_permute, permute))
    for x, y in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)
    for x, y in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    means = triton_permute.gathered_means(query, plan.query_order, plan.query_offsets)
    expected_means = permute.gathered_means(query, plan.query_order, plan.query_offsets)
    torch.testing.assert_close(means, expected_means)


@pytest.mark.parametrize("routing", ["output_error", "svg_ear", "mass"])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_probe(equal, routing):
    query, key, value = inputs(150, 64, heads=2)
    valid = torch.ones(1, 150, dtype=torch.bool)
    valid[0, 120:] = False
    plan = random_plan(query, key, value, equal=equal, valid=valid, num_text=20)
    centroids = permute.gathered_means(query, plan.query_order, plan.query_offsets)
    arguments = (
        centroids, plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids,
        SCALE, routing, not equal,
    )  # fmt: skip
    expected, rows = probe.probe(*arguments), triton_probe.probe(*arguments)
    actual = rows._replace(error=rows.error - triton_route.shift_of(rows, routing)[..., None])
    if routing != "output_error":
        torch.testing.assert_close(actual.mass, expected.mass)
    torch.testing.assert_close(actual.gap, expected.gap, atol=1e-5, rtol=1e-5)
    # A block of one token, or one that all queries weigh alike, has no error but rounding.
    some = expected.error > -20
    assert some.any()
    torch.testing.assert_close(actual.error[some], expected.error[some], atol=1e-4, rtol=1e-4)
    assert (actual.error[~some] < -20).all()
