"""Measured errors on a GPU: right, the same bits twice, and never waited for before they are read."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from gpu.cuda import inputs, no_waiting
from torch import Tensor

from svg_ear_compile.kernels import context, ops, reference  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.measuring import errors as measure
from svg_ear_compile.precedence import resolve
from svg_ear_compile.runtime.readback import Sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TEXT, GRID = 40, (5, 12, 13)
SITE = 0
SHAPE = (2, 3, math.prod(GRID) + TEXT, 128)
CONSTANTS = SiteConstants(None, TEXT, False, list(GRID), "auto", "output_error", True, 0.3, 0, SITE)


def attend(
    qkv: tuple[Tensor, ...], request: context.Measure, dense: bool = False, mask: Tensor | None = None,
    **decision: Any,
) -> tuple[Tensor, context.Results]:  # fmt: skip
    decided = context.SiteDecision("a test" if dense else "", CONSTANTS.density, measure=request, **decision)
    call = context.RunContext(context.Decisions({SITE: decided}, strict=True))
    if mask is not None:
        call.memo.seen_keys[SITE] = None
    with context.active(call):
        return torch.ops.svg_ear.attention(*qkv, mask, *CONSTANTS), call.results


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_error(masked, monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 10**6)  # all rows: nothing is left to chance
    qkv = inputs(SHAPE)
    mask = None
    if masked:
        mask = (torch.arange(qkv[0].shape[2], device="cuda") < qkv[0].shape[2] - 9).expand(2, 1, 1, -1)
    out, call = attend(qkv, context.Measure(1), mask=mask)
    exact = reference.dense(*qkv, mask)
    lost, whole = (out.double() - exact).square().sum((-1, -2)), exact.square().sum((-1, -2))
    torch.testing.assert_close(call.measured[SITE][0].double(), torch.stack([lost, whole]), rtol=0.02, atol=0)


def test_nothing_waits_before_it_is_read():
    qkv = inputs(SHAPE)
    attend(qkv, context.Measure(1))
    attend(qkv, context.Measure(1, (0.2, 0.5)), dense=True)
    attend(qkv, context.Measure(1, (0.3,), ("cubes", "splits"), True))
    Sums(torch.zeros(1, 2, 2, 3, device="cuda"))  # the first pinned allocation may wait
    torch.cuda.synchronize()
    with no_waiting():
        _, sparse = attend(qkv, context.Measure(1))
        _, dense = attend(qkv, context.Measure(1, (0.2, 0.5)), dense=True)
        attend(qkv, context.Measure(1, (0.3,), ("cubes", "splits"), True))
        sums = [Sums(call.measured[SITE]) for call in (sparse, dense)]
    ((error, worst),), (low, high) = (s.errors() for s in sums)
    assert 0 < error < worst < 1
    assert 0 < high[0] < low[0] < 1


def test_forms_are_what_sparse_calls_of_them_measure(monkeypatch):
    """Orders with and without first-order terms, tried in a dense and in a sparse call, on all rows."""
    monkeypatch.setattr(measure, "ROWS", 10**6)
    qkv, density = inputs(SHAPE), CONSTANTS.density
    request, forms = context.Measure(1, (density,), ("cubes", "splits"), True), []
    for split in ((), (True,) * 3):
        for first_order in ((), (True,) * 3):
            _, one = attend(qkv, context.Measure(1), split_heads=split, first_order=first_order)
            forms.append(one.measured[SITE])
    expected = torch.cat(forms)
    _, dense = attend(qkv, request, dense=True)
    _, sparse = attend(qkv, request)
    torch.testing.assert_close(dense.measured[SITE], expected, rtol=0.05, atol=0)
    torch.testing.assert_close(sparse.measured[SITE], torch.cat([forms[0], expected]), rtol=0.05, atol=0)


def test_the_same_bits_twice_and_another_seed_is_another_sample():
    qkv = inputs(SHAPE)
    first, again, other = (attend(qkv, context.Measure(seed))[1].measured[SITE] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_trial_is_what_the_sparse_call_then_makes(monkeypatch):
    """The plan's own formula against the kernel, on all rows: a trial draws tokens, a sparse call slots."""
    monkeypatch.setattr(measure, "ROWS", 10**6)
    qkv = inputs(SHAPE)
    _, dense = attend(qkv, context.Measure(1, (CONSTANTS.density,)), dense=True)
    _, sparse = attend(qkv, context.Measure(1))
    torch.testing.assert_close(dense.measured[SITE], sparse.measured[SITE], rtol=0.05, atol=0)


@pytest.mark.parametrize(("heads", "share"), [(8, 0.01), (40, 0.003)])
def test_a_measurement_takes_a_small_share_of_the_call(heads, share):
    """Of 720p video, averaged over calls of which one in measure_every is; medians of 15 in turns."""
    grid = (21, 45, 80)
    as_models = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((1, heads, math.prod(grid), 128))
    ]
    constants = SiteConstants(None, 0, False, list(grid), "auto", "output_error", True, 0.25, 0, SITE)

    def milliseconds(measured: bool) -> float:
        decision = context.SiteDecision(density=0.25, measure=context.Measure(1) if measured else None)
        call = context.RunContext(context.Decisions({SITE: decision}, strict=True), memo=memo)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with context.active(call):
            start.record()
            torch.ops.svg_ear.attention(*as_models, None, *constants)
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    memo = context.Memo()
    times = [(milliseconds(False), milliseconds(True)) for _ in range(18)][3:]
    without, with_it = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{without:.2f} ms, measured {with_it:.2f} ms: {with_it / without - 1:+.2%} of the call")
    assert (with_it / without - 1) / resolve({}, {}).settings.measure_every < share
