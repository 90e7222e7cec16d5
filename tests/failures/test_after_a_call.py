"""What fails after a graph is compiled is warned of once and counted; only strict hears an exception."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from toy import EAGER, ToyInputs, ToyVideo, compiled

import svg_ear_compile
from svg_ear_compile.reporting import diagnostics

pytestmark = pytest.mark.usefixtures("fresh")


def fails(*args: Any) -> Any:
    raise ZeroDivisionError("ours")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("stage", ["report", "complaint"])
def test_announcing(
    toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch, stage: str, strict: bool
) -> None:
    monkeypatch.setattr(diagnostics, stage, fails)
    run = compiled(toy, {**EAGER, "strict": strict})
    if strict:
        with pytest.raises(BackendCompilerFailed, match="ours"):
            run(*toy_inputs())
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*toy_inputs())
        torch._dynamo.mark_dynamic(x := toy_inputs(frames=5)[0], 2)
        run(x, *toy_inputs()[1:])
    told = [str(w.message) for w in caught if "svg_ear" in str(w.message)]
    assert told == ["svg_ear: a compiled graph was not announced because of ZeroDivisionError('ours')"]
    fallbacks = [graph.fallbacks for graph in svg_ear_compile.report().graphs]
    assert fallbacks == [{"announcing: ZeroDivisionError": 1}] * 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_report_that_cannot_be_written(
    toy: ToyVideo, toy_inputs: ToyInputs, tmp_path: Path, strict: bool
) -> None:
    run = compiled(toy, {**EAGER, "strict": strict, "report": str(tmp_path / "no" / "folder.json")})
    raises = pytest.raises(BackendCompilerFailed, match="No such file")
    warns = pytest.warns(RuntimeWarning, match="the report was not written because of FileNotFoundError")
    try:
        with raises if strict else warns:
            run(*toy_inputs())
    finally:
        diagnostics._paths.clear()


@pytest.mark.slow
def test_a_report_that_cannot_be_written_at_exit(tmp_path: Path) -> None:
    """The folder goes away while the program runs. Its exit status stays what it was."""
    folder = tmp_path / "reports"
    folder.mkdir()
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from toy import EAGER, ToyInputs, ToyVideo, compiled
torch.set_grad_enabled(False)
run = compiled(ToyVideo(layers=1).eval(), {{**EAGER, "strict": False, "report": {str(folder / "r.json")!r}}})
run(*ToyInputs()())
import shutil
shutil.rmtree({str(folder)!r})
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the report was not written because of FileNotFoundError") == 1
    assert "Traceback" not in done.stderr
