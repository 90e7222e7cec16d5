"""torch.compile(backend="svg_ear") on a toy video transformer, from Dynamo's graph to the counters."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from toy import EAGER, SPARSE, ToyInputs, ToyVideo, calls, compiled

import svg_ear_compile
from svg_ear_compile import backend as backend_module
from svg_ear_compile.exceptions import SettingsError
from svg_ear_compile.reporting import diagnostics

pytestmark = pytest.mark.usefixtures("fresh")


class Recorder:
    """An inner backend that keeps the graph it gets, and runs it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(backend_module, "_inner", lambda resolved: recorder)
    return recorder


def names(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if "svg_ear" in str(node.target)]


# --- what becomes of the graph ---


@pytest.mark.parametrize(
    ("merge", "ops"),
    [(True, ["attention"]), (False, ["clustered_permute", "sparse_exact", "centroid_compensation"])],
)
def test_each_self_attention_is_rewritten(
    toy: ToyVideo, toy_inputs: ToyInputs, inner: Recorder, merge: bool, ops: list[str]
) -> None:
    compiled(toy, {**SPARSE, "merge": merge})(*toy_inputs())
    assert names(inner.graphs[0]) == [f"svg_ear.{op}.default" for op in ops] * 2
    report = svg_ear_compile.report()
    assert [(s.decision.module_path, s.decision.kind, s.decision.rewritten) for s in report.sites] == [
        ("blocks.0.attn1", "self", True),
        ("blocks.0.attn2", "cross", False),
        ("blocks.1.attn1", "self", True),
        ("blocks.1.attn2", "cross", False),
    ]
    assert calls() == (2, {})


def test_merged_or_not_is_the_same(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    one = compiled(toy, {**EAGER, "first_order": False})(*toy_inputs())
    torch._dynamo.reset()
    three = compiled(toy, {**EAGER, "merge": False})(*toy_inputs())
    torch.testing.assert_close(one, three)


@pytest.mark.filterwarnings("ignore:svg_ear rewrote none")
def test_nothing_to_rewrite_leaves_the_graph_alone(
    toy: ToyVideo, toy_inputs: ToyInputs, inner: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, inputs = _captured(toy, toy_inputs)
    graph, code, forward = gm.graph, str(gm.graph), gm.forward
    monkeypatch.setattr(gm, "recompile", lambda: pytest.fail("recompiled"))
    assert backend_module.svg_ear(gm, inputs) == forward, "no wrapper"
    assert gm.graph is graph
    assert str(gm.graph) == code


def _captured(toy: ToyVideo, toy_inputs: ToyInputs) -> tuple[torch.fx.GraphModule, Any]:
    found: list[Any] = []

    def capture(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend([gm, list(inputs)])
        return gm.forward

    torch.compile(toy, backend=capture)(*toy_inputs())
    return found[0], found[1]


def test_nothing_rewritten_says_so(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    with pytest.warns(
        UserWarning, match="svg_ear rewrote none of 4 attention sites: 2 x too few tokens .*min_tokens"
    ):
        compiled(toy, {"inner": "eager"})(*toy_inputs())


def test_off_is_plain(
    toy: ToyVideo, toy_inputs: ToyInputs, inner: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVG_EAR", "0")
    out = compiled(toy, SPARSE)(*toy_inputs())
    assert torch.equal(out, toy(*toy_inputs()))
    assert not names(inner.graphs[0])
    assert not svg_ear_compile.report().graphs


def test_report_only(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    inner: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SVG_EAR", "report")
    compiled(toy, SPARSE)(*toy_inputs())
    assert not names(inner.graphs[0])
    assert [s.decision.reason for s in svg_ear_compile.report().sites] == ["REPORT_ONLY", "CROSS"] * 2
    assert "nothing is rewritten" in capsys.readouterr().err


def test_settings_from_the_environment(
    toy: ToyVideo, toy_inputs: ToyInputs, inner: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVG_EAR_MIN_TOKENS", "64")
    compiled(toy)(*toy_inputs())
    assert len(names(inner.graphs[0])) == 2


# --- failures ---


def _break(monkeypatch: pytest.MonkeyPatch, error: Exception, name: str = "rewrite") -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(backend_module, name, fail)


@pytest.mark.parametrize("name", ["match", "classify", "read_inputs", "rewrite"])
def test_a_failure_of_ours_means_dense_and_one_warning(
    toy: ToyVideo, toy_inputs: ToyInputs, inner: Recorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _break(monkeypatch, KeyError("lost"), name)
    with pytest.warns(RuntimeWarning, match=r"without being rewritten, because of KeyError\('lost'\)"):
        out = compiled(toy, {**SPARSE, "strict": False})(*toy_inputs())
    assert torch.equal(out, toy(*toy_inputs()))
    assert not names(inner.graphs[0])
    report = svg_ear_compile.report()
    assert report.graphs[0].failure == "KeyError('lost')"
    assert "graph 0 was left as it was, because of KeyError('lost')" in str(report)
    assert {s.decision.reason for s in report.sites} <= {"OUR_FAILURE", "CROSS"}


def test_strict_raises(toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, KeyError("lost"))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="lost"):
        compiled(toy, EAGER)(*toy_inputs())
    assert not svg_ear_compile.report().graphs


def test_what_dynamo_steers_by_propagates(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, inputs = _captured(toy, toy_inputs)
    for error in (torch._dynamo.exc.SkipFrame("skip"), torch._dynamo.exc.UnspecializeRestartAnalysis()):
        _break(monkeypatch, error)
        with pytest.raises(type(error)):
            backend_module.svg_ear(gm, inputs, options={**EAGER, "strict": False})


def test_errors_of_the_inner_compiler_are_not_ours(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gm: Any, inputs: Any) -> None:
        raise RuntimeError("inductor says no")

    monkeypatch.setattr(backend_module, "_inner", lambda resolved: fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inductor says no"):
        compiled(toy, {**SPARSE, "strict": False})(*toy_inputs())
    assert not svg_ear_compile.report().graphs


def test_settings_errors_reach_the_user_even_if_not_strict(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    with pytest.raises(Exception, match="did you mean 'density'") as caught:
        compiled(toy, {"densty": 0.3})(*toy_inputs())
    assert isinstance(caught.value, SettingsError) or "SettingsError" in str(caught.value)


def test_a_failure_before_a_call_means_a_dense_call(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compiled(toy, {**EAGER, "strict": False})
    run(*toy_inputs())
    monkeypatch.setattr(backend_module.SparseCallable, "_prepare", lambda *a: 1 / 0)
    with pytest.warns(RuntimeWarning, match="a graph runs dense because of ZeroDivisionError"):
        out = run(*toy_inputs())
    assert torch.equal(out, toy(*toy_inputs()))
    assert calls() == (2, {"failures": 2})
    assert svg_ear_compile.report().totals()["fallbacks"] == {"before a call: ZeroDivisionError": 1}


# --- what is dense when ---


def test_dense_steps_and_layers(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**EAGER, "dense_steps": 0.5, "num_steps": 4, "dense_layers": 1})
    outs = [run(*toy_inputs(t)) for t in (999, 999, 700, 500, 200)]
    assert calls() == (2, {"warm-up steps": 6, "dense layers": 2})
    assert torch.equal(outs[0], toy(*toy_inputs(999)))
    assert not torch.equal(outs[3], toy(*toy_inputs(500)))
    run(*toy_inputs(999))
    assert calls() == (2, {"warm-up steps": 8, "dense layers": 2}), "a second generation warms up again"


def test_two_models_outside_of_a_pipeline_share_nothing(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    options = {**EAGER, "dense_steps": 1, "dense_layers": 1}
    early, late = compiled(toy, options), compiled(copy.deepcopy(toy), options)
    early(*toy_inputs(999))
    early(*toy_inputs(900))
    late(*toy_inputs(500))
    assert calls() == (1, {"warm-up steps": 4, "dense layers": 1})


def test_blocks_compiled_one_by_one(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    options = {**EAGER, "dense_steps": 1, "dense_layers": 1, "sites": "*attn1"}
    for block in toy.blocks:
        block.compile(backend="svg_ear", fullgraph=True, options=options)
    for t in (999, 999, 500, 200):
        toy(*toy_inputs(t))
    report = svg_ear_compile.report()
    assert len(report.graphs) == 1
    assert report.graphs[
        0
    ].steps == "1 dense first steps; the number of steps is unknown outside of a pipeline: " + (
        "set it with svg_ear_compile.generation(num_steps=...), or the setting num_steps"
    )
    assert calls() == (2, {"warm-up steps": 4, "dense layers": 2})


def test_the_helper_counts(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**EAGER, "dense_steps": 0.25})
    with svg_ear_compile.generation(num_steps=4, branches=2):
        for _ in range(8):
            run(*toy_inputs(999))
    assert calls() == (12, {"warm-up steps": 4})
    assert "generation(num_steps=...)" in svg_ear_compile.report().graphs[0].steps


def test_reset_forgets_everything(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**EAGER, "preset": "svg_ear", "dense_steps": 2})
    run(*toy_inputs(999))
    assert svg_ear_compile.report().graphs
    torch._dynamo.reset()
    assert not svg_ear_compile.report().graphs
    run(*toy_inputs(500))
    assert {e.step for e in svg_ear_compile.report().errors()} == {0}, "another generation begins"


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 does, with any backend")
def test_nothing_refers_to_weights_after_a_call(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    """Module.to() cannot swap weights that somebody holds weakly."""
    run = compiled(toy, {**EAGER, "dense_steps": 0})
    run(*toy_inputs(999))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        toy.to("cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    run(*toy_inputs(999))


def test_where_no_graph_holds_attention_the_report_names_the_graph_breaks() -> None:
    @torch.compiler.disable
    def attention(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def model(x: torch.Tensor) -> torch.Tensor:
        return attention(x + 1) * 2

    torch.compile(model, backend="svg_ear", options={"inner": "eager"})(torch.randn(1, 1, 64, 16))
    first, *breaks = str(svg_ear_compile.report()).splitlines()
    assert first == "svg_ear: 2 compiled graphs, no attention in them"
    assert len(breaks) == 1
    assert re.search(r"graph break: .*torch.compiler.disable.* at .*test_backend.py:\d+; ", breaks[0])


def test_counters_of_dynamo_hold_the_verdicts(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    torch._dynamo.utils.counters.clear()
    compiled(toy, EAGER)(*toy_inputs())
    assert torch._dynamo.utils.counters["svg_ear"] == {"graphs": 1, "REWRITTEN": 2, "CROSS": 2}


def test_the_log_shows_times_matches_and_graphs(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(diagnostics.log, "isEnabledFor", lambda level: True)
    monkeypatch.setattr(diagnostics.log, "debug", lambda text, *args, **_: said.append(text % args))
    compiled(toy, EAGER)(*toy_inputs())
    text = "\n".join(said)
    for step in ("match", "classify", "rewrite"):
        assert re.search(rf"svg_ear: {step} took \d+\.\d ms", text)
    assert "graph 0 has 4 attention calls" in text
    assert "graph 0: 2 calls rewritten" in text
    before, after = text.split("svg_ear: the graph after")
    assert "torch._C._nn.scaled_dot_product_attention" in before.split("svg_ear: the graph before")[1]
    assert after.count("torch.ops.svg_ear.attention.default") == 2
