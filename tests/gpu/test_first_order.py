"""First-order terms on a GPU: matrices against float64, both attention kernels against the formula."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from svg_ear_compile.kernels import plan as plans
from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.attention import covariance_torch as covariance
from svg_ear_compile.kernels.attention import first_order

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from plans import random_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CHOSEN = (True, False, True)
DTYPES = [torch.float16, torch.bfloat16]


def inputs(length: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]; values go with their keys."""
    random = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, length, 3, head_dim, generator=random)
    v = v + k @ torch.randn(head_dim, head_dim, generator=random) * (4 / head_dim**0.5)
    return tuple(x.to("cuda", dtype).transpose(1, 2) for x in (q, k, v))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("hopper", [False, True], ids=["triton", "chosen"])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula(monkeypatch, dtype, head_dim, equal, hopper, masked):
    kernels = pytest.importorskip("svg_ear_compile.kernels.attention.triton")
    if not hopper:
        monkeypatch.setattr(kernels, "why_not_hopper", lambda *found: "a test")
    monkeypatch.setattr(plans, "MOST_MATRICES", 3 if masked else 256)
    query, key, value = inputs(1111, head_dim, dtype)
    valid = torch.ones(2, 1111, dtype=torch.bool)
    valid[1, 700:] = False
    plan = random_plan(
        query, key, value, equal=equal, num_text=77, text_first=True, valid=valid if masked else None
    )
    if masked:
        hidden = (torch.arange(1111, device="cuda") >= plan.key_offsets[..., -1:])[..., None]
        plan = plan._replace(
            key=plan.key.masked_fill(hidden, math.nan), value=plan.value.masked_fill(hidden, math.nan)
        )
    scale = head_dim**-0.5
    out = torch.full_like(query, math.nan)
    out = first_order.attend(query, plan, scale, out, not equal, CHOSEN)
    clean = plan._replace(key=plan.key.nan_to_num(0), value=plan.value.nan_to_num(0))
    expected = reference.joint_softmax(query, clean, scale, first_order=CHOSEN)
    plain = reference.joint_softmax(query, clean, scale)
    low = reference.joint_softmax(query, clean, scale, query.dtype)
    # The matrices are rounded to the input's dtype: relative to what they add.
    added = (expected - plain).abs().max().item()
    allowed = 2 * (low.double() - plain).abs().max().item() + (1 + added) * torch.finfo(dtype).eps
    error = (out.double() - expected).abs().max().item()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
    assert added > 10 * allowed, "there is something to add"


@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_covariances_equal_the_formula(head_dim, dtype, equal):
    triton_covariance = pytest.importorskip("svg_ear_compile.kernels.attention.covariance_triton")
    query, key, value = inputs(333, head_dim, dtype)
    plan = random_plan(query, key, value, equal=equal)
    heads = torch.tensor([2, 0], device="cuda")
    columns = plan.bias.shape[-1] + 3
    arguments = plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids
    found = triton_covariance.covariances(*arguments, heads, columns)
    expected = covariance.covariances(
        *(x.double() if x.is_floating_point() else x for x in arguments), heads, columns
    )
    assert not found[:, :, -3:].any()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(dtype).eps + 2e-6


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("most", [20, 256])
def test_weights_of_blocks_equal_the_formula(monkeypatch, most, head_dim, dtype):
    monkeypatch.setattr(plans, "MOST_MATRICES", most)
    triton_covariance = pytest.importorskip("svg_ear_compile.kernels.attention.covariance_triton")
    query, key, value = inputs(9001, head_dim, dtype)
    plan = random_plan(query, key, value)
    plan.bias[0, 0, 2] -= 300
    plan.bias[0, 0, 3] = plan.bias[0, 0, 4:8] = -torch.inf
    plan.key_centroids[0, 1, 5] = torch.nan
    heads, columns = torch.tensor([2, 0, 1], device="cuda"), plan.bias.shape[-1] + 3
    arguments = 20 * plan.query_centroids, plan.bias, plan.key_centroids, heads, head_dim**-0.5, columns
    found, expected = triton_covariance.weights(*arguments), covariance.weights(*arguments)
    assert found[0, 1, 0].any()
    group = plans.term_blocks(plan.bias.shape[2])
    assert not found[0, 1, -(-4 // group) : 8 // group].any()
    assert not found[0, 2].any()
    assert not found[..., -3:].any()
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error < torch.finfo(dtype).eps + 1e-5
