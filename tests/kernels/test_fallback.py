"""An op that fails runs dense, warns once and counts; strict raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_calls import CONSTANTS, B, decided, inputs, lies_by_token, merged, three
from torch import Tensor

from svg_ear_compile.exceptions import SiteError
from svg_ear_compile.kernels import context, fallback
from svg_ear_compile.kernels.attention import torch as cpu_kernels
from svg_ear_compile.kernels.routing import torch as route


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
    first = context.RunContext()
    with context.active(first), pytest.warns(RuntimeWarning, match=r"site 3 .*no way") as caught:
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert len(caught) == 1
    assert first.results.dense == {3: "failed: ValueError"}
    assert first.results.fallbacks == {"fallback: ValueError": 1}
    found = context.Results(fallbacks=first.results.fallbacks)
    second = context.RunContext(results=found, memo=context.Memo(warned=first.memo.warned))
    with context.active(second), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(whole(*tensors, None, CONSTANTS), want)
    assert first.results.fallbacks == {"fallback: ValueError": 2}


def test_runs_on_the_device_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current GPU, and layers may lie on others."""
    current: list[torch.device] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def launch(*_: Any) -> Any:
        assert current == [torch.device("cpu")]
        return 1 / 0

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(route, "route", launch)
    with context.active(context.RunContext()), pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        merged(*inputs(70), None, CONSTANTS)
    assert not current


@pytest.mark.parametrize("whole", [merged, three])
def test_what_failed_is_not_tried_once_more(
    whole: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that runs dense instead measures no trial, which would fail for the same reason."""
    monkeypatch.setattr(route, "route", raising(ValueError("no way")))
    call = decided(CONSTANTS, strict=False, measure=context.Measure(0, (0.2,)))
    with context.active(call), pytest.warns(RuntimeWarning, match="ran dense") as caught:
        whole(*inputs(70), None, CONSTANTS)
    assert len(caught) == 1
    assert call.results.fallbacks == {"fallback: ValueError": 1}


@pytest.mark.parametrize("kernel", ["sparse_exact", "centroid_compensation"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_failing_kernel_means_dense(kernel: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, kernel, raising(ValueError("no way")))
    tensors = inputs(70)
    mask = (torch.arange(70) < 60).expand(B, 1, 1, 70) if masked else None
    with context.active(context.RunContext()), pytest.warns(RuntimeWarning):
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
    call = context.RunContext(context.Decisions(strict=True, names={3: "blocks.0"}))
    with context.active(call), pytest.raises(SiteError, match=r"site 3 \(blocks.0\) failed: .*no way"):
        whole(*inputs(70), None, CONSTANTS)


def test_device_errors_always_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "route", raising(torch.AcceleratorError("device lost")))
    call = context.RunContext()
    with context.active(call), pytest.raises(torch.AcceleratorError):
        merged(*inputs(70), None, CONSTANTS)
    assert not call.results.dense


@pytest.mark.parametrize("whole", [merged, three])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_tokens": 68}, "too few tokens"),
        ({"min_tokens": 67}, ""),
        ({"min_frames": 2, "grid": [1, 67, 1]}, "one frame"),
        ({"min_frames": 2}, ""),
    ],
)
def test_a_call_that_is_too_small_is_dense(
    whole: Callable[..., Tensor], inside: bool, changes: dict[str, Any], reason: str
) -> None:
    """67 video tokens and 3 of text. Without a grid nothing says how many frames there are."""
    tensors = inputs(70)
    c = CONSTANTS._replace(num_text=3, order="cubes", density=0.01, **changes)
    call = context.RunContext()
    with context.active(call) if inside else nullcontext():
        got = whole(*tensors, None, c)
    want = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(got, want) == bool(reason)
    assert call.results.dense == ({c.site: reason} if reason and inside else {})


def test_frames_of_this_call_count_where_the_graph_does_not_know_them() -> None:
    call = context.RunContext(context.Decisions(grid=(1, 7, 10)))
    with context.active(call):
        merged(*inputs(70), None, CONSTANTS._replace(min_frames=2))
    assert call.results.dense == {3: "one frame"}


@pytest.mark.parametrize("whole", [merged, three])
def test_without_its_host_a_site_is_dense(whole: Callable[..., Tensor]) -> None:
    """Compiled code that was saved and loaded in ways that lose what decides each call: one warning."""
    fallback._warn_of_no_host.cache_clear()
    tensors, c = inputs(70), CONSTANTS._replace(density=0.01, host=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [whole(*tensors, None, c) for _ in range(2)]
    want = F.scaled_dot_product_attention(*tensors)
    assert all(torch.equal(out, want) for out in outs)
    assert [str(w.message).split(",")[0] for w in caught] == [
        "svg_ear: compiled code runs without the part that decides each call"
    ]
    with context.active(context.RunContext()):
        assert not torch.equal(whole(*tensors, None, c), want)
