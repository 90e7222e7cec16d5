"""The attention kernels on a GPU: against the fp64 reference, and through the ops against dense.

Tests that take `kernels` run with the Triton kernel and, where it would be chosen, with the one for Hopper.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import context, ops, reference  # noqa: F401 - ops registers torch.ops.svg_ear
from svg_ear_compile.kernels.plan import SparsePlan

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from gpu.both_kernels import both_kernels
from plans import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SLACK = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 2e-5}


@pytest.fixture(params=["triton", "hopper"])
def kernels(request, monkeypatch):
    yield from both_kernels(request, monkeypatch, "attention", "attend")


def inputs(
    length: int, head_dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, batch, length, heads, head_dim, generator=random)
    return tuple(y.to("cuda", dtype).transpose(1, 2) for y in x)


def output_like(query: Tensor) -> Tensor:
    B, H, L, D = query.shape
    return torch.full((B, L, H, D), math.nan, dtype=query.dtype, device=query.device).transpose(1, 2)


def check(
    actual: Tensor, query: Tensor, plan: SparsePlan, scale: float, formula=reference.joint_softmax
) -> None:
    """At most twice the error of the same formula in plain low-precision PyTorch (FlashAttention's rule)."""
    expected, low = formula(query, plan, scale), formula(query, plan, scale, query.dtype)
    if isinstance(expected, tuple):
        expected, low = expected[0], low[0]
    error = (actual.double() - expected).abs().max().item()
    allowed = 2 * (low.double() - expected).abs().max().item() + SLACK[query.dtype]
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(kernels, dtype, head_dim, equal):
    query, key, value = inputs(1111, head_dim, dtype)
    valid = torch.ones(2, 1111, dtype=torch.bool)
    valid[1, 900:] = False
    for text, first, masked in ((0, False, False), (77, True, False), (130, False, True)):
        plan = random_plan(
            query, key, value, equal=equal, num_text=text, text_first=first, valid=valid if masked else None
        )
        scale = head_dim**-0.5
        out = kernels.attend(query, plan, scale, output_like(query), variable=not equal)
        check(out, query, plan, scale)
        exact, lse = kernels.sparse_exact(query, plan, scale, output_like(query), variable=not equal)
        check(exact, query, plan, scale, reference.exact_part)
        expected = reference.exact_part(query, plan, scale)[1]
        torch.testing.assert_close(lse.double(), expected, atol=2e-2, rtol=0)
        merged = kernels.centroid_compensation(
            query, exact, lse, plan, scale, output_like(query), variable=not equal
        )
        check(merged, query, plan, scale)


@pytest.mark.parametrize("head_dim", [16, 20, 32, 100, 192, 256])
def test_other_head_dims(kernels, head_dim):
    query, key, value = inputs(333, head_dim, torch.bfloat16)
    for equal in (True, False):
        plan = random_plan(query, key, value, equal=equal)
        check(kernels.attend(query, plan, 0.1, output_like(query), variable=not equal), query, plan, 0.1)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_every_configuration_tried_by_the_benchmark(kernels):
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from attention_configs import CLUSTERS, EQUAL

    tma = torch.cuda.get_device_capability() >= (9, 0)
    query, key, value = inputs(777, 128, torch.bfloat16)
    for equal, configs in ((True, EQUAL), (False, CLUSTERS)):
        plan = random_plan(query, key, value, equal=equal, num_text=100)
        for config in configs:
            if config.tma and not tma:
                continue
            out = kernels.attend(query, plan, 0.1, output_like(query), variable=not equal, config=config)
            check(out, query, plan, 0.1)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_slots_of_masked_keys_are_never_read(kernels, equal):
    query, key, value = inputs(500, 128, torch.bfloat16)
    valid = torch.ones(2, 500, dtype=torch.bool)
    valid[0, 30:] = False
    valid[1, ::3] = False
    plan = random_plan(query, key, value, equal=equal, valid=valid)
    expected = kernels.attend(query, plan, 0.1, output_like(query), variable=not equal)
    hidden = torch.arange(500, device="cuda") >= plan.key_offsets[..., -1:]
    poisoned = plan._replace(
        key=plan.key.masked_fill(hidden[..., None], math.nan),
        value=plan.value.masked_fill(hidden[..., None], math.nan),
    )
    out = kernels.attend(query, poisoned, 0.1, output_like(query), variable=not equal)
    assert torch.equal(out, expected)
    check(out, query, plan, 0.1)


def test_large_logits(kernels):
    query, key, value = inputs(400, 64, torch.bfloat16)
    scale = 500 / (query.double() @ key.double().mT).abs().max().item()
    for equal in (True, False):
        plan = random_plan(query, key, value, equal=equal)
        check(kernels.attend(query, plan, scale, output_like(query), variable=not equal), query, plan, scale)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_rows_with_nothing_kept(kernels, equal):
    query, key, value = inputs(300, 128, torch.bfloat16)
    plan = random_plan(query, key, value, equal=equal, keep=0.0)
    exact, lse = kernels.sparse_exact(query, plan, 0.1, output_like(query), variable=not equal)
    assert not exact.any()
    assert (lse == -math.inf).all()
    check(kernels.attend(query, plan, 0.1, output_like(query), variable=not equal), query, plan, 0.1)
    dropped = random_plan(query, key, value, equal=equal, keep=0.0, compensate=False)
    assert not kernels.attend(query, dropped, 0.1, output_like(query), variable=not equal).any()


def test_same_bits_twice(kernels):
    query, key, value = inputs(2000, 128, torch.bfloat16)
    for equal in (True, False):
        plan = random_plan(query, key, value, equal=equal)
        outs = [kernels.attend(query, plan, 0.1, output_like(query), variable=not equal) for _ in range(50)]
        assert all(torch.equal(outs[0], out) for out in outs)


def test_nan_stays_in_its_head(kernels):
    query, key, value = inputs(700, 128, torch.bfloat16)
    for x in (query, key, value):
        for equal in (True, False):
            clean = x[1, 1, 640, 5].clone()
            plan = random_plan(query, key, value, equal=equal)
            expected = kernels.attend(query, plan, 0.1, output_like(query), variable=not equal)
            x[1, 1, 640, 5] = math.nan
            plan = random_plan(query, key, value, equal=equal)
            out = kernels.attend(query, plan, 0.1, output_like(query), variable=not equal)
            x[1, 1, 640, 5] = clean
            assert out[1, 1].isnan().any()
            others = torch.ones(2, 3, dtype=torch.bool)
            others[1, 1] = False
            assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_cuda_graph(kernels, equal):
    query, key, value = inputs(600, 128, torch.bfloat16)
    plan = random_plan(query, key, value, equal=equal)
    out = output_like(query)
    expected = kernels.attend(query, plan, 0.1, out, variable=not equal).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.attend(query, plan, 0.1, out, variable=not equal)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("order", ["cubes", "splits", "kmeans"])
@pytest.mark.parametrize(
    ("text", "first", "masked"), [(0, False, False), (50, True, False), (60, False, True)]
)
def test_density_one_equals_dense(order, text, first, masked):
    grid = (5, 14, 17)
    length = math.prod(grid) + text
    query, key, value = inputs(length, 128, torch.bfloat16)
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device="cuda")
        mask[1, ..., -40:] = False
    with context.active(context.RunContext(context.Decisions(strict=True))):
        out = torch.ops.svg_ear.attention(
            query, key, value, mask, None, text, first, list(grid), order, "output_error", True, 1.0, 0, 0
        )
    expected = reference.dense(query, key, value, mask)
    low = reference.dense(query, key, value, mask, dtype=torch.bfloat16)
    error = (out.double() - expected).abs().max().item()
    assert error <= 2 * (low.double() - expected).abs().max().item() + SLACK[torch.bfloat16]


@pytest.mark.parametrize("order", ["cubes", "kmeans"])
@pytest.mark.parametrize("routing", ["output_error", "svg_ear"])
def test_three_ops_equal_the_merged_one_and_the_plan(order, routing):
    grid = (5, 14, 17)
    length = math.prod(grid) + 33
    query, key, value = inputs(length, 128, torch.bfloat16)
    constants = (None, 33, False, list(grid), order, routing, True, 0.3, 0, 0)
    svg_ear = torch.ops.svg_ear
    with context.active(context.RunContext(context.Decisions(strict=True))):
        merged = svg_ear.attention(query, key, value, None, *constants)
    with context.active(context.RunContext(context.Decisions(strict=True))):
        plan = svg_ear.clustered_permute(query, key, value, None, *constants)
        exact, lse = svg_ear.sparse_exact(query, key, value, None, *plan, *constants)
        three = svg_ear.centroid_compensation(query, exact, lse, *plan, *constants)
    check(merged, query, SparsePlan(*plan), 128**-0.5)
    check(three, query, SparsePlan(*plan), 128**-0.5)
