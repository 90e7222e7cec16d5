"""The rewritten toy model through Inductor: shapes, static inputs, warm caches, processes of their own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from toy import EAGER, SPARSE, ToyInputs, ToyVideo, calls, compiled

import svg_ear_compile
from svg_ear_compile import backend as backend_module

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def toy() -> ToyVideo:
    """A single block, since compiling takes long."""
    return ToyVideo(layers=1).eval()


def test_density_one_is_exact(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    out = compiled(toy, {**SPARSE, "density": 1.0})(*toy_inputs())
    assert calls() == (1, {})
    torch.testing.assert_close(out, toy(*toy_inputs()), rtol=1e-4, atol=1e-5)


def test_a_dense_call_is_bitwise_what_inductor_gives(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    ours = compiled(toy, {**SPARSE, "dense_steps": 50})(*toy_inputs())
    assert calls() == (0, {"warm-up steps": 1})
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
    assert calls() == (4, {})


def _counted(counter: CompileCounterWithBackend, gm: torch.fx.GraphModule, inputs: Any) -> Any:
    counter.frame_count += 1
    return backend_module.svg_ear(gm, inputs, options={**EAGER, "density": 1.0})


@pytest.mark.slow
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
    with monkeypatch.context() as patch, torch._functorch.config.patch(enable_autograd_cache=False):
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


def test_an_untouched_graph_stays_in_the_report(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVG_EAR", "report")
    run = compiled(toy, SPARSE)
    run(*toy_inputs())
    gc.collect()
    assert len(svg_ear_compile.report().sites) == 2
    del run
    torch._dynamo.reset()
    assert not svg_ear_compile.report().sites


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
    with torch._functorch.config.patch(enable_autograd_cache=False):
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


def _process(cache: Path, kwargs: str, **environ: str) -> tuple[dict[str, Any], str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    clean |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), **environ}
    script = SCRIPT.format(tests=str(Path(__file__).parent), kwargs=kwargs)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_warm_second_process(inductor_cache: Path) -> None:
    kwargs = f"dict(backend='svg_ear', options={SPARSE!r})"
    first, _ = _process(inductor_cache, kwargs)
    second, log = _process(inductor_cache, kwargs, TORCH_LOGS="+svg_ear_compile")
    assert first == second
    assert (second["rewritten"], second["sparse_calls"]) == (2, 2)
    assert "blocks.*.attn1" in log, "TORCH_LOGS shows the report"


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="needs torch 2.13")
def test_by_the_environment_alone(inductor_cache: Path, tmp_path: Path) -> None:
    """The report is printed once, and is an artifact of torch's trace."""
    settings = {f"SVG_EAR_{k.upper()}": str(v) for k, v in EAGER.items()}
    settings |= {"SVG_EAR": "1", "SVG_EAR_REPORT": "1", "TORCH_TRACE": str(tmp_path / "trace")}
    totals, err = _process(inductor_cache, "{}", **settings)
    assert (totals["rewritten"], totals["sparse_calls"]) == (2, 2)
    assert err.count("blocks.*.attn1") == 1
    trace = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert '"artifact": {"name": "svg_ear_report", "encoding": "string"}' in trace
    assert "blocks.*.attn1" in trace
