"""The whole op on a GPU: same bits every time, no waiting for the device, CUDA graphs, memory, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu.cuda import inputs, no_waiting
from torch import Tensor

from svg_ear_compile.kernels import context, ops, reference  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.dense import dense_attention
from svg_ear_compile.kernels.plan import SparsePlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def constants(
    text: int, grid: tuple[int, ...], order: str = "auto", routing: str = "output_error", density: float = 0.3
) -> tuple[Any, ...]:
    return (None, text, False, list(grid), order, routing, True, density, 0, 0)


def attend(qkv, mask: Tensor | None, fixed: tuple[Any, ...]) -> Tensor:
    with context.active(context.RunContext(context.Decisions(strict=True))):
        return torch.ops.svg_ear.attention(*qkv, mask, *fixed)


CASES = {
    "cubes": ((1, 3, 5 * 12 * 13 + 40, 128), 40, (5, 12, 13), "auto", "output_error"),
    "splits": ((2, 2, 700, 64), 0, (), "splits", "output_error"),
    "paper": ((1, 2, 1500, 128), 0, (), "kmeans", "svg_ear"),
    "svg2": ((1, 2, 1500, 128), 0, (), "kmeans", "mass"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_thousand_runs_give_the_same_bits(case):
    shape, text, grid, order, routing = CASES[case]
    qkv, fixed = inputs(shape), constants(text, grid, order, routing)
    first = attend(qkv, None, fixed)
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(100 if order == "kmeans" else 1000):
        different += (attend(qkv, None, fixed) != first).any()
    assert different.item() == 0


def test_two_runs_at_a_real_size_give_the_same_bits():
    qkv, fixed = inputs((1, 8, 21 * 30 * 52, 128)), constants(0, (21, 30, 52), density=0.15)
    assert torch.equal(attend(qkv, None, fixed), attend(qkv, None, fixed))


def some_heads(shape, first_order):
    """A call in which every other head gets first-order terms."""
    heads = tuple(head % 2 == 0 for head in range(shape[1])) if first_order else ()
    decision = context.SiteDecision(density=0.3, first_order=heads)
    return context.RunContext(context.Decisions({0: decision}, strict=True))


@pytest.mark.parametrize("first_order", [False, True], ids=["centroids", "first order"])
@pytest.mark.parametrize("case", ["cubes", "splits"])
def test_the_host_never_waits_for_the_device(case, first_order):
    shape, text, grid, order, routing = CASES[case]
    qkv, fixed = inputs(shape), constants(text, grid, order, routing)
    call = some_heads(shape, first_order)
    with context.active(call):
        torch.ops.svg_ear.attention(*qkv, None, *fixed)  # kernels are compiled and constants uploaded here
        with no_waiting():
            torch.ops.svg_ear.attention(*qkv, None, *fixed)


@pytest.mark.parametrize("first_order", [False, True], ids=["centroids", "first order"])
@pytest.mark.parametrize("case", ["cubes", "splits"])
def test_a_cuda_graph_records_the_op(case, first_order):
    shape, text, grid, order, routing = CASES[case]
    fixed = constants(text, grid, order, routing)
    static = inputs(shape)
    call = some_heads(shape, first_order)
    with context.active(call):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.ops.svg_ear.attention(*static, None, *fixed)
        torch.cuda.current_stream().wait_stream(stream)
        call.memo.carried.clear()  # as the host does: a recorded call makes its own orders
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.ops.svg_ear.attention(*static, None, *fixed)
    others = inputs(shape, seed=1)
    for x, y in zip(static, others, strict=True):
        x.copy_(y)
    graph.replay()
    with context.active(some_heads(shape, first_order)):
        assert torch.equal(out, torch.ops.svg_ear.attention(*others, None, *fixed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_joint_softmax_of_its_plan(case, dtype):
    """At most twice the error of the same formula in low precision (FlashAttention's rule)."""
    shape, text, grid, order, routing = CASES[case]
    B, _, L, D = shape
    qkv, fixed = inputs(shape, dtype), constants(text, grid, order, routing)
    mask = torch.ones(B, 1, 1, L, device="cuda", dtype=torch.bool)
    mask[-1, ..., -17:] = False
    for seen in (None, mask):
        with context.active(context.RunContext(context.Decisions(strict=True))):
            plan = SparsePlan(*torch.ops.svg_ear.clustered_permute(*qkv, seen, *fixed))
        out = attend(qkv, seen, fixed)
        remade = reference.remade(plan, *qkv[1:])
        exact = reference.joint_softmax(qkv[0], remade, 1 / math.sqrt(D))
        low = reference.joint_softmax(qkv[0], plan, 1 / math.sqrt(D), dtype)
        assert (out - exact).abs().max() <= 2 * (low - exact).abs().max() + 1e-5


def test_not_numbers_stay_in_their_head():
    shape, text, grid, order, routing = CASES["cubes"]
    fixed = constants(text, grid, order, routing)
    clean = inputs(shape)
    good = attend(clean, None, fixed)
    for i in range(3):
        poisoned = [x.clone() for x in clean]
        poisoned[i][0, 1, 100, 3] = math.nan
        out = attend(poisoned, None, fixed)
        dense = dense_attention(*poisoned, None, None)
        assert not out[:, [0, 2]].isnan().any()
        assert out[0, 1][dense[0, 1].isnan()].isnan().all()
    assert not good.isnan().any()


def test_memory_of_a_call_at_wan_720p():
    """At most 2.5 GB beyond query, key, value and output: permuted key and value (1.55), scores and lists."""
    grid = (21, 45, 80)
    qkv, fixed = inputs((1, 40, math.prod(grid), 128)), constants(0, grid, density=0.15)
    attend(qkv, None, fixed)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(qkv, None, fixed)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= 2.5e9


@pytest.mark.parametrize("case", CASES)
def test_neither_default_dtype_nor_default_device_matters(case):
    shape, text, grid, order, routing = CASES[case]
    qkv, fixed = inputs(shape), constants(text, grid, order, routing)
    wanted = attend(qkv, None, fixed)
    try:
        for dtype, device in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            assert torch.equal(attend(qkv, None, fixed), wanted), (dtype, device)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
