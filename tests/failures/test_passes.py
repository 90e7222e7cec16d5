"""A pass that fails: dense, one warning, a line in the report; strict raises, and names the sites."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, ResetRequired, SkipFrame, UnspecializeRestartAnalysis
from toy import EAGER, ToyInputs, ToyVideo, compiled

import svg_ear_compile
from svg_ear_compile import backend
from svg_ear_compile.passes import classify

pytestmark = pytest.mark.usefixtures("fresh")
LENIENT = {**EAGER, "strict": False}
STAGES = [
    (backend, "match"), (backend, "classify"), (classify, "read_layout"), (backend, "read_inputs"),
    (backend, "rewrite"),
]  # fmt: skip
NAMED = ["read_inputs", "rewrite"]
"""Stages that know which sites are to be rewritten."""


def broken(monkeypatch: pytest.MonkeyPatch, stage: tuple[Any, str], error: BaseException) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(*stage, fail)


@pytest.mark.parametrize(
    ("stage", "error"),
    [*((stage, KeyError("lost")) for stage in STAGES), (STAGES[1], torch.OutOfMemoryError("full"))],
    ids=lambda x: x[1] if isinstance(x, tuple) else type(x).__name__,
)
def test_dense_one_warning_and_a_line_in_the_report(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    error: Exception,
) -> None:
    broken(monkeypatch, stage, error)
    run = compiled(toy, LENIENT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [run(*toy_inputs()) for _ in range(2)]
    assert [str(w.message).count(repr(error)) for w in caught if "svg_ear" in str(w.message)] == [1]
    assert all(torch.equal(out, toy(*toy_inputs())) for out in outs)
    report = svg_ear_compile.report()
    assert report.graphs[0].failure == repr(error)
    assert repr(error) in str(report)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage[1])
def test_strict_raises(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, stage: tuple[Any, str]
) -> None:
    broken(monkeypatch, stage, KeyError("lost"))
    with pytest.raises(BackendCompilerFailed, match=r"PassError.*lost") as caught:
        compiled(toy, EAGER)(*toy_inputs())
    assert isinstance(caught.value.inner_exception.__cause__, KeyError)
    if stage[1] in NAMED:
        assert "0 (blocks.0.attn1), 2 (blocks.1.attn1)" in str(caught.value)
    assert not svg_ear_compile.report().graphs


@pytest.mark.parametrize(("stage", "strict"), [(STAGES[1], False), (STAGES[-1], True)])
def test_what_is_not_ours_to_handle_propagates(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[Any, str],
    strict: bool,
) -> None:
    """Errors of the device, and those by which Dynamo steers. The graph is as it was."""
    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def capture(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch.compile(toy, backend=capture)(*toy_inputs())
    ((gm, inputs),) = graphs
    code = str(gm.graph)
    for error in (
        torch.AcceleratorError("device lost"), SkipFrame("skip"), ResetRequired(),
        UnspecializeRestartAnalysis(), KeyboardInterrupt(),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            broken(patch, stage, error)
            with pytest.raises(type(error)):
                backend.svg_ear(gm, inputs, options={**EAGER, "strict": strict})
        assert str(gm.graph) == code
        assert not svg_ear_compile.report().graphs
