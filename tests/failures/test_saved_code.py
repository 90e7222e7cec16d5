"""Compiled code that is saved and loaded again loses what decides each call: it is compiled anew, or dense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import SPARSE, ToyInputs, ToyVideo, compiled

import svg_ear_compile

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from toy import SPARSE, ToyInputs, ToyVideo, calls, compiled
torch.set_grad_enabled(False)
torch._dynamo.config.caching_precompile = True
mode, path = sys.argv[1:]
if mode == "load":
    torch.compiler.load_cache_artifacts(open(path, "rb").read())
run = compiled(ToyVideo(layers=1).eval(), {{**SPARSE, "dense_steps": 1}})
outs = [run(*ToyInputs()(t)).double().sum().item() for t in (999, 500)]
print(outs, calls())
if mode == "save":
    open(path, "wb").write(torch.compiler.save_cache_artifacts()[0])
"""


def process(mode: str, path: Path, cache: Path) -> tuple[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script, mode, str(path)],
        env={**clean, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], done.stderr


@pytest.mark.slow
def test_caching_precompile_stores_no_rewritten_graph(tmp_path: Path) -> None:
    """Both processes have the dense first step and the report; only torch's other caches are warm."""
    path = tmp_path / "artifacts"
    first, said = process("save", path, tmp_path / "first")
    assert first.endswith("(1, {'warm-up steps': 1})")
    assert "caching_precompile does not store graphs with sparse attention" in said
    second, said = process("load", path, tmp_path / "second")
    assert second == first
    assert "runs without the part that decides" not in said


@pytest.mark.usefixtures("fresh")
def test_aot_compile_is_dense_and_says_so(toy_inputs: ToyInputs) -> None:
    from torch._dynamo.aot_compile import ModelInput

    toy, inputs = ToyVideo(layers=1).eval(), toy_inputs(frames=16)
    run = compiled(toy, SPARSE, fullgraph=True)
    with pytest.warns(UserWarning, match=r"rewrote none .* to be saved \(aot_compile\) loses what decides"):
        run._aot_compile([ModelInput(inputs, {}, [torch.no_grad()])])
    assert [s.decision.reason for s in svg_ear_compile.report().sites] == ["SAVED", "CROSS"]
    loaded = compiled(toy, SPARSE, fullgraph=True)
    loaded._load_aot_compiled_module(run._save_aot_compiled_module())
    torch.testing.assert_close(loaded(*inputs), toy(*inputs), rtol=1e-4, atol=1e-5)
