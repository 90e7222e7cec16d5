"""The Triton gather and probe on a GPU against the plain PyTorch ones, in float32 and in low precision.

Tests that take `kernels` run with the Triton probe and, where it would be chosen, with the one for Hopper.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from svg_ear_compile.kernels.blocks import permute_torch as permute
from svg_ear_compile.kernels.probe import torch as probe

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from gpu.both_kernels import both_kernels
from plans import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(params=["triton", "hopper"])
def kernels(request, monkeypatch):
    routing = request.node.callspec.params.get("routing", "output_error")
    if request.param == "hopper" and routing != "output_error":
        pytest.skip("the faster kernel computes output_error alone")
    yield from both_kernels(request, monkeypatch, "probe", "probe")


def inputs(length: int, head_dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 3):
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, batch, length, heads, head_dim, generator=random)
    return tuple(y.to("cuda", dtype).transpose(1, 2) for y in x)


def plan_of(equal: bool, head_dim: int, dtype: torch.dtype):
    query, key, value = inputs(777, head_dim, dtype)
    valid = torch.ones(2, 777, dtype=torch.bool)
    valid[1, 500:] = False
    return query, key, value, random_plan(query, key, value, equal=equal, valid=valid, num_text=70)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gather_and_means(dtype, head_dim, equal):
    triton_permute = pytest.importorskip("svg_ear_compile.kernels.blocks.permute_triton")
    query, key, value, plan = plan_of(equal, head_dim, dtype)
    of_keys = plan.key_order, plan.key_offsets
    actual = triton_permute.gather_with_means(key, value, *of_keys)
    expected = permute.gather_with_means(key.cpu(), value.cpu(), *(x.cpu() for x in of_keys), True)
    for moved, wanted in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(moved.cpu(), wanted)
    means = [*actual[2:], triton_permute.gathered_means(query, plan.query_order, plan.query_offsets)]
    of_queries = permute.gathered_means(query.cpu(), plan.query_order.cpu(), plan.query_offsets.cpu())
    tolerance = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}  # rounded once
    for mean, wanted in zip(means, [*expected[2:], of_queries], strict=True):
        torch.testing.assert_close(mean.float().cpu(), wanted, **tolerance)


def rounded_error(centroids, key, value, offsets, scale, dtype):
    """kernels/probe/triton.py's formula for "output_error", its centred weights rounded to dtype."""
    B, H, Cq, _ = centroids.shape
    Ck = offsets.shape[-1] - 1
    error, lse = torch.full((2, B, H, Cq, Ck), -math.inf)
    for b in range(B):
        for h in range(H):
            for j in range(Ck):
                first, end = offsets[b, h, j : j + 2].tolist()
                if first == end:
                    continue
                logits = scale * centroids[b, h] @ key[b, h, first:end].float().T
                top = logits.amax(-1, keepdim=True)
                weights = (logits - top).exp()
                lse[b, h, :, j] = top[:, 0] + weights.sum(-1).log()
                centred = (weights - weights.mean(-1, keepdim=True)).to(dtype).float()
                lost = (centred @ value[b, h, first:end].float()).square().sum(-1)
                error[b, h, :, j] = 2 * top[:, 0] + lost.log() - math.log(end - first)
    return error - 2 * lse.logsumexp(-1, keepdim=True)


def check(triton_probe, query, plan, routing: str, equal: bool) -> None:
    """Against the PyTorch probe on the CPU; errors within twice what rounding the weights does to them."""
    from svg_ear_compile.kernels.routing import triton as triton_route

    dtype, head_dim = query.dtype, query.shape[-1]
    scale, variable = head_dim**-0.5, not equal
    # Rounded as the kernel rounds them, so that both see the same centroids.
    tensors = [
        permute.gathered_means(query, plan.query_order, plan.query_offsets).to(dtype).float(), plan.key,
        plan.value, plan.key_offsets, plan.key_centroids.float(), plan.value_centroids.float(),
    ]  # fmt: skip
    on_cpu = [x.cpu() for x in tensors]
    expected = probe.probe(*on_cpu, scale, routing, variable)
    rows = triton_probe.probe(*tensors, scale, routing, variable)
    actual = rows._replace(error=rows.error - triton_route.shift_of(rows, routing)[..., None])
    if routing == "svg_ear":
        torch.testing.assert_close(actual.mass.cpu(), expected.mass, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.gap.cpu(), expected.gap, atol=1e-3, rtol=1e-3)
    # A block of one token, or one that all queries weigh alike, has no error but rounding.
    some = expected.error > -20
    budget = 1e-3
    if routing == "output_error" and dtype != torch.float32:
        low = rounded_error(*on_cpu[:4], scale, dtype)
        budget += 2 * (low[some] - expected.error[some]).abs().max().item()
    assert (actual.error.cpu()[some] - expected.error[some]).abs().max() <= budget
    again = triton_probe.probe(*tensors, scale, routing, variable)
    pairs = zip(rows, again, strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("routing", ["output_error", "svg_ear"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores(kernels, dtype, routing, equal, head_dim):
    query, _, _, plan = plan_of(equal, head_dim, dtype)
    check(kernels, query, plan, routing, equal)


@pytest.mark.parametrize("length", [9000, 17000])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_than_a_program_takes(kernels, head_dim, length):
    """71 and 133 query blocks: of both groups of warps, and of one alone; 141 and 266 key blocks: runs of them."""
    query, key, value = inputs(length, head_dim, torch.bfloat16, batch=1, heads=2)
    check(kernels, query, random_plan(query, key, value), "output_error", True)


@pytest.mark.parametrize("head_dim", [128])
def test_nan_blocks_are_nan_and_stay_in_their_head(kernels, head_dim):
    query, _, _, plan = plan_of(True, head_dim, torch.bfloat16)
    centroids = permute.gathered_means(query, plan.query_order, plan.query_offsets)
    for name in ("key", "value"):
        poisoned = plan._replace(**{name: getattr(plan, name).clone()})
        getattr(poisoned, name)[1, 2, 70, 3] = math.nan
        scores = kernels.probe(
            centroids, poisoned.key, poisoned.value, plan.key_offsets, plan.key_centroids.float(),
            plan.value_centroids.float(), 0.1, "output_error", False,
        )  # fmt: skip
        assert scores.error[1, 2, :, 1].isnan().all()
        others = torch.ones(2, 3, dtype=torch.bool)
        others[1, 2] = False
        assert not scores.error[others].isnan().any()
