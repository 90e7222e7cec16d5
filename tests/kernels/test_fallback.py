"""An op that fails runs dense, warns once and counts; strict raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import CONSTANTS, B, inputs, lies_by_token, merged, three
from torch import Tensor

from svg_ear_compile.kernels import attention as cpu_kernels
from svg_ear_compile.kernels import context, route
from svg_ear_compile.kernels.fallback import SiteError


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("whole", [merged, three])
def test_a_failure_means_dense_and_one_warning(
    whole: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    tensors = inputs(70)
    want = F.scaled_dot_product_attention(*tensors)
    first = context.Call()
    with context.active(first), pytest.warns(RuntimeWarning, match=r"site 3 .*no way") as caught:
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert len(caught) == 1
    assert first.dense == {3: "failed: ValueError"}
    assert first.counters == {"fallback: ValueError": 1}
    second = context.Call(counters=first.counters, warned=first.warned)
    with context.active(second), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert first.counters == {"fallback: ValueError": 2}


@pytest.mark.parametrize("kernel", ["sparse_exact", "centroid_compensation"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_failing_kernel_means_dense(kernel: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, kernel, raising(ValueError("no way")))
    tensors = inputs(70)
    mask = (torch.arange(70) < 60).expand(B, 1, 1, 70) if masked else None
    with context.active(context.Call()), pytest.warns(RuntimeWarning):
        got = three(*tensors, mask, CONSTANTS)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*tensors, attn_mask=mask))
    assert lies_by_token(got)


def test_outside_of_a_call_the_merged_op_falls_back_and_the_three_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    tensors = inputs(70)
    with pytest.warns(RuntimeWarning):
        got = merged(*tensors, None, CONSTANTS)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors))
    with pytest.raises(ValueError, match="no way"):
        three(*tensors, None, CONSTANTS)


@pytest.mark.parametrize("whole", [merged, three])
def test_strict_raises(whole: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    call = context.Call(strict=True, names={3: "blocks.0"})
    with context.active(call), pytest.raises(SiteError, match=r"site 3 \(blocks.0\) failed: .*no way"):
        whole(*inputs(70), None, CONSTANTS)


def test_device_errors_always_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "route", raising(torch.AcceleratorError("device lost")))
    call = context.Call()
    with context.active(call), pytest.raises(torch.AcceleratorError):
        merged(*inputs(70), None, CONSTANTS)
    assert not call.dense
