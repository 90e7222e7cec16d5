"""The Triton gather and probe on a GPU against the plain PyTorch ones, in float32 and in low precision."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from svg_ear_compile.kernels import permute, probe
from svg_ear_compile.kernels.plan import KEY_BLOCK

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from plans import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(length: int, head_dim: int, dtype: torch.dtype):
    """query, key, value [2,3,L,D], strided as a model's [B,L,H,D]."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, length, 3, head_dim, generator=random)
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
    triton_permute = pytest.importorskip("svg_ear_compile.kernels.triton_permute")
    query, key, _, plan = plan_of(equal, head_dim, dtype)
    gathered, means = triton_permute.gather_with_means(key, plan.key_order, plan.key_offsets)
    expected = permute.gather_with_means(key, plan.key_order, plan.key_offsets, True)
    assert torch.equal(gathered, expected[0])
    torch.testing.assert_close(means, expected[1], atol=1e-6, rtol=1e-5)
    means = triton_permute.gathered_means(query, plan.query_order, plan.query_offsets)
    expected = permute.gathered_means(query, plan.query_order, plan.query_offsets)
    torch.testing.assert_close(means, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("routing", ["output_error", "svg_ear"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores(dtype, routing, equal):
    triton_probe = pytest.importorskip("svg_ear_compile.kernels.triton_probe")
    for head_dim in (64, 96, 128):
        query, _, _, plan = plan_of(equal, head_dim, dtype)
        # Rounded as the kernel rounds them, so that both see the same centroids.
        centroids = permute.gathered_means(query, plan.query_order, plan.query_offsets).to(dtype).float()
        arguments = (
            centroids, plan.key, plan.value, plan.key_offsets, plan.key_centroids.float(),
            plan.value_centroids.float(), head_dim**-0.5, routing, KEY_BLOCK if equal else None,
        )  # fmt: skip
        expected, actual = probe.probe(*arguments), triton_probe.probe(*arguments)
        tolerance = 1e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(actual.mass, expected.mass, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(actual.gap, expected.gap, atol=1e-3, rtol=1e-3)
        # A block of one token, or one that all queries weigh alike, has no error but rounding.
        some = expected.error > -20
        torch.testing.assert_close(actual.error[some], expected.error[some], atol=tolerance, rtol=1e-3)
        assert (actual.error[~some] < -18).all()
        again = triton_probe.probe(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_nan_blocks_are_nan_and_stay_in_their_head():
    triton_probe = pytest.importorskip("svg_ear_compile.kernels.triton_probe")
    query, _, _, plan = plan_of(True, 128, torch.bfloat16)
    centroids = permute.gathered_means(query, plan.query_order, plan.query_offsets)
    for name in ("key", "value"):
        poisoned = plan._replace(**{name: getattr(plan, name).clone()})
        getattr(poisoned, name)[1, 2, 70, 3] = math.nan
        scores = triton_probe.probe(
            centroids, poisoned.key, poisoned.value, plan.key_offsets, plan.key_centroids.float(),
            plan.value_centroids.float(), 0.1, "output_error", KEY_BLOCK,
        )  # fmt: skip
        assert scores.error[1, 2, :, 1].isnan().all()
        others = torch.ones(2, 3, dtype=torch.bool)
        others[1, 2] = False
        assert not scores.error[others].isnan().any()
