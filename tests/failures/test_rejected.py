"""Inductor rejects a rewritten graph: it compiles the graph again as it was. One warning; strict raises."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._inductor.graph import GraphLowering
from toy import EAGER, SPARSE, ToyInputs, ToyVideo, compiled

import svg_ear_compile
from svg_ear_compile import backend
from svg_ear_compile.passes.rewrite import rewrite

pytestmark = pytest.mark.usefixtures("fresh")
LENIENT = {**SPARSE, "strict": False}
OURS = torch.ops.svg_ear.attention.default


def while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph calls our op with arguments too few: AOTAutograd cannot trace it."""

    def wrong(*args: Any) -> torch.fx.Graph:
        graph = rewrite(*args)
        for node in graph.find_nodes(op="call_function", target=OURS):
            node.args = node.args[:4]
        return graph

    monkeypatch.setattr(backend, "rewrite", wrong)


def while_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor has run its passes over the graph and stops at our op."""
    original = GraphLowering.call_function

    def call_function(self: GraphLowering, target: Any, args: Any, kwargs: Any) -> Any:
        if target is OURS:
            raise NotImplementedError("no lowering")
        return original(self, target, args, kwargs)

    monkeypatch.setattr(GraphLowering, "call_function", call_function)


def run(toy: ToyVideo, inputs: tuple[torch.Tensor, ...], **kwargs: Any) -> torch.Tensor:
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return torch.compile(toy, dynamic=True, **kwargs)(*inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reject", [pytest.param(while_tracing, marks=pytest.mark.slow), while_lowering])
def test_it_is_what_plain_inductor_gives(
    toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, reject: Any
) -> None:
    """Sizes are symbols; the same weights are static inputs."""
    import torch._inductor.compile_fx as compile_fx

    toy = ToyVideo(layers=1).eval()
    static: list[list[int]] = []
    original = compile_fx._compile_fx_inner

    def spy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        out = original(gm, inputs, **kwargs)
        static.append(list(kwargs["static_input_idxs"]))
        return out

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", spy)
    plain, plain_static = run(toy, toy_inputs(), backend="inductor"), static.copy()
    static.clear()
    reject(monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = run(toy, toy_inputs(), backend="svg_ear", options=LENIENT)
    assert torch.equal(ours, plain)
    assert static == plain_static
    told = [str(w.message) for w in caught if "svg_ear" in str(w.message)]
    assert len(told) == 1
    assert "a graph is compiled again as it was, because of" in told[0]
    report = svg_ear_compile.report()
    assert [s.decision.reason for s in report.sites] == ["OUR_FAILURE", "CROSS"]
    assert not any(s.decision.rewritten for s in report.sites)
    assert "was left as it was, because of" in str(report)


@pytest.mark.slow
def test_unbacked_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that only the run shows: symbols that the first try had made do no harm."""

    class Counted(ToyVideo):
        def forward(self, clip: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(clip, timestep, text / (text > 0).nonzero().float().mean())

    toy, inputs = Counted().eval(), ToyInputs()()
    while_lowering(monkeypatch)
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.warns(RuntimeWarning, match="compiled again as it was"),
    ):
        out = compiled(toy, LENIENT, fullgraph=True)(*inputs)
    torch.testing.assert_close(out, toy(*inputs), rtol=1e-4, atol=1e-5)


def refuse(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> list[list[str]]:
    """An inner compiler that raises these in turn; the targets in the graphs that it got."""
    seen: list[list[str]] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append([str(node.target) for node in gm.graph.nodes])
        error = errors[len(seen) - 1]
        if error is not None:
            raise error
        return gm.forward

    monkeypatch.setattr(backend, "_inner", lambda resolved: inner)
    return seen


def test_the_user_sees_the_error_of_the_graph_as_it_was(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    refuse(monkeypatch, KeyError("ours"), ValueError("plain Inductor's"))
    with pytest.raises(BackendCompilerFailed, match="plain Inductor's") as caught:
        compiled(toy, {**EAGER, "strict": False})(*toy_inputs())
    assert caught.value.inner_exception.__context__ is None
    assert not [w for w in recwarn if "svg_ear" in str(w.message)]
    assert not svg_ear_compile.report().graphs


def test_strict_raises(toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, KeyError("ours"), None)
    with pytest.raises(
        BackendCompilerFailed, match=r"PassError.*sites 0 \(blocks.0.attn1\), 2 .*ours"
    ) as caught:
        compiled(toy, EAGER)(*toy_inputs())
    assert isinstance(caught.value.inner_exception.__cause__, KeyError)
    assert not svg_ear_compile.report().graphs


@pytest.mark.parametrize("strict", [False, True])
def test_dynamo_restarts_and_lost_devices_are_not_tried_again(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    seen = refuse(monkeypatch, TensorifyScalarRestartAnalysis(), None)
    compiled(toy, {**EAGER, "strict": strict})(*toy_inputs())
    assert len(seen) == 2
    assert all("svg_ear.attention.default" in graph for graph in seen), "handed over again"
    torch._dynamo.reset()
    seen = refuse(monkeypatch, torch.AcceleratorError("device lost"))
    with pytest.raises(BackendCompilerFailed, match="device lost"):
        compiled(toy, {**EAGER, "strict": strict})(*toy_inputs())
    assert len(seen) == 1
