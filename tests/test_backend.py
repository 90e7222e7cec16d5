"""torch.compile(backend="svg_ear") on a toy video transformer, from Dynamo's graph to the counters."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import ToyInputs, ToyVideo

import svg_ear_compile
from svg_ear_compile import backend as backend_module
from svg_ear_compile.settings import SettingsError
from svg_ear_compile.state import layers

pytestmark = pytest.mark.usefixtures("fresh")
SPARSE = {"min_tokens": 64, "strict": True, "dense_steps": 0, "dense_layers": 0}
"""Every self attention sparse in every call."""
EAGER = {**SPARSE, "inner": "eager"}


def compiled(model: nn.Module, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return torch.compile(model, backend="svg_ear", options=options, **kwargs)


def calls() -> tuple[int, dict[str, int]]:
    totals = svg_ear_compile.report().totals()
    return totals["sparse_calls"], totals["dense_calls"]


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
    one = compiled(toy, EAGER)(*toy_inputs())
    torch._dynamo.reset()
    three = compiled(toy, {**EAGER, "merge": False})(*toy_inputs())
    assert torch.equal(one, three)


@pytest.mark.parametrize("options", [{}, {"min_tokens": 10_000}])
@pytest.mark.filterwarnings("ignore:svg_ear rewrote none")
def test_nothing_to_rewrite_leaves_the_graph_alone(
    toy: ToyVideo,
    toy_inputs: ToyInputs,
    inner: Recorder,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched: list[object] = []
    monkeypatch.setattr(torch.fx.GraphModule, "recompile", lambda self: touched.append(self))
    monkeypatch.setattr(backend_module, "SparseCallable", lambda *a: pytest.fail("a wrapper around nothing"))
    gm, inputs = _captured(toy, toy_inputs)
    graph, code = gm.graph, str(gm.graph)
    touched.clear()
    backend_module.svg_ear(gm, inputs, options=options)
    assert gm.graph is graph
    assert str(gm.graph) == code
    assert not touched


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


@pytest.mark.parametrize("name", ["match", "classify", "read_inputs", "rewrite", "merge"])
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
    monkeypatch.setattr(backend_module.SparseCallable, "_tick", lambda *a: 1 / 0)
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


def test_two_models_share_the_trajectory(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    options = {**EAGER, "dense_steps": 2, "dense_layers": 1}
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
    assert report.graphs[0].clock == "the clock reads the timestep embedding"
    assert calls() == (2, {"warm-up steps": 4, "dense layers": 2})


def test_the_helper_counts(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**EAGER, "dense_steps": 0.25})
    with svg_ear_compile.generation(num_steps=4, branches=2):
        for _ in range(8):
            run(*toy_inputs(999))
    assert calls() == (12, {"warm-up steps": 4})
    assert "generation(num_steps=...)" in svg_ear_compile.report().graphs[0].steps


def test_reset_forgets_everything(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    compiled(toy, {**EAGER, "preset": "svg_ear"})(*toy_inputs())
    assert len(layers) == 2
    assert svg_ear_compile.report().graphs
    torch._dynamo.reset()
    assert len(layers) == 0
    assert not svg_ear_compile.report().graphs


def test_centroids_are_carried_per_layer_and_branch(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**EAGER, "preset": "svg_ear"})
    for t in (999, 999, 500):
        run(*toy_inputs(t))
    (first, second) = (layers.layer(b.attn1.to_q.weight, layers.new_model()) for b in toy.blocks)
    assert (first.number, second.number) == (0, 1)
    assert sorted(first.carried) == sorted(second.carried) == [0, 1]


# --- with Inductor ---


def test_density_one_is_exact(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    out = compiled(toy, {**SPARSE, "density": 1.0})(*toy_inputs())
    assert calls() == (2, {})
    torch.testing.assert_close(out, toy(*toy_inputs()), rtol=1e-4, atol=1e-5)


def test_a_dense_call_is_bitwise_what_inductor_gives(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    ours = compiled(toy, {**SPARSE, "dense_steps": 50})(*toy_inputs())
    assert calls() == (0, {"warm-up steps": 2})
    torch._dynamo.reset()
    plain = torch.compile(toy, backend="inductor")(*toy_inputs())
    assert torch.equal(ours, plain)


def test_four_sizes_recompile_as_plain_inductor_does(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    counter = CompileCounterWithBackend("svg_ear")
    run = torch.compile(toy, backend=lambda gm, inputs: _counted(counter, gm, inputs))
    for frames, size in ((4, 16), (3, 24), (5, 20), (2, 32)):
        inputs = toy_inputs(frames=frames, size=size)
        torch.testing.assert_close(run(*inputs), toy(*inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert calls() == (8, {})


def _counted(counter: CompileCounterWithBackend, gm: torch.fx.GraphModule, inputs: Any) -> Any:
    counter.frame_count += 1
    return backend_module.svg_ear(gm, inputs, options={**EAGER, "density": 1.0})


def test_dynamic_from_the_start(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    run = compiled(toy, {**SPARSE, "density": 1.0}, dynamic=True)
    for frames, size in ((4, 16), (3, 24)):
        inputs = toy_inputs(frames=frames, size=size)
        torch.testing.assert_close(run(*inputs), toy(*inputs), rtol=1e-4, atol=1e-5)
    assert len(svg_ear_compile.report().graphs) == 1


def _static_inputs(
    monkeypatch: pytest.MonkeyPatch, toy: ToyVideo, inputs: tuple[Tensor, ...], **kwargs: Any
) -> list[int]:
    """Which inputs Inductor takes for static: weights, that a CUDA graph need not copy."""
    import torch._inductor.compile_fx as compile_fx

    seen: list[list[int]] = []
    original = compile_fx._compile_fx_inner

    def spy(gm: Any, example_inputs: Any, **graph_kwargs: Any) -> Any:
        seen.append(list(graph_kwargs["static_input_idxs"]))
        return original(gm, example_inputs, **graph_kwargs)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(compile_fx, "_compile_fx_inner", spy)
        torch.compile(toy, **kwargs)(*inputs)
    (only,) = seen
    return only


def test_static_inputs_are_those_of_plain_inductor(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _static_inputs(monkeypatch, toy, toy_inputs(), backend="inductor")
    ours = _static_inputs(monkeypatch, toy, toy_inputs(), backend="svg_ear", options=SPARSE)
    assert ours == plain
    assert len(plain) == len(list(toy.parameters()))


def test_options_for_inductor_arrive(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.compile_fx as compile_fx

    seen: list[bool] = []
    original = compile_fx._compile_fx_inner

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch._inductor.config.max_autotune_pointwise)
        return original(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", spy)
    compiled(toy, {**SPARSE, "max_autotune_pointwise": True})(*toy_inputs())
    assert seen == [True]
    assert torch._inductor.config.max_autotune_pointwise is False


SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from toy import ToyInputs, ToyVideo
with torch.no_grad():
    model, inputs = ToyVideo().eval(), ToyInputs()()
    out = torch.compile(model, **{kwargs})(*inputs)
assert "svg_ear_compile.backend" in sys.modules
import svg_ear_compile
print(json.dumps(dict(svg_ear_compile.report().totals(), out=out.double().sum().item())))
"""


def _process(tmp_path: Path, kwargs: str, **environ: str) -> tuple[dict[str, Any], str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    clean |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environ}
    script = SCRIPT.format(tests=str(Path(__file__).parent), kwargs=kwargs)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_warm_second_process(tmp_path: Path) -> None:
    kwargs = f"dict(backend='svg_ear', options={SPARSE!r})"
    first, _ = _process(tmp_path, kwargs)
    second, log = _process(tmp_path, kwargs, TORCH_LOGS="+svg_ear_compile")
    assert first == second
    assert (second["rewritten"], second["sparse_calls"]) == (2, 2)
    assert "blocks.*.attn1" in log, "TORCH_LOGS shows the report"


def test_by_the_environment_alone(tmp_path: Path) -> None:
    settings = {f"SVG_EAR_{k.upper()}": str(v) for k, v in EAGER.items()}
    totals, err = _process(tmp_path, "{}", SVG_EAR="1", SVG_EAR_REPORT="1", **settings)
    assert (totals["rewritten"], totals["sparse_calls"]) == (2, 2)
    assert err.count("blocks.*.attn1") == 1


def test_the_report_is_a_trace_artifact(tmp_path: Path) -> None:
    _process(tmp_path, f"dict(backend='svg_ear', options={EAGER!r})", TORCH_TRACE=str(tmp_path / "trace"))
    text = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert '"artifact": {"name": "svg_ear_report", "encoding": "string"}' in text
    assert "blocks.*.attn1" in text
