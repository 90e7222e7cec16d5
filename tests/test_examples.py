"""Every example runs as it stands, in a process of its own that imports nothing of ours by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, tmp_path: Path, **environment: str) -> tuple[str, list[dict[str, object]]]:
    """(standard output, the sites of the report) of an example."""
    assert "svg_ear_compile" not in (EXAMPLES / name).read_text()
    report = tmp_path / "report.json"
    variables = {
        "SVG_EAR_REPORT": str(report),
        "SVG_EAR_INNER": "eager",
    }  # Inductor: test_backend_inductor.py
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, **variables, **environment},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sites = [site for graph in json.loads(report.read_text())["graphs"] for site in graph["sites"]]
    return done.stdout, sites


def decisions(sites: list[dict[str, object]]) -> dict[str, bool]:
    return {str(site["module_path"]): bool(site["rewritten"]) for site in sites}


def test_whole_model(tmp_path: Path) -> None:
    """Self attention is rewritten, cross attention is dense and says why."""
    printed, sites = run("whole_model.py", tmp_path)
    wanted = {f"blocks.{i}.attn1": True for i in range(2)} | {f"blocks.{i}.attn2": False for i in range(2)}
    assert decisions(sites) == wanted
    assert all("cross attention" in str(s["sentence"]) for s in sites if not s["rewritten"])
    difference = float(printed.split()[-1])
    assert 0 < difference < 0.1


@pytest.mark.slow
def test_the_report_in_the_readme_is_the_example_s() -> None:
    """The table; what was measured differs from run to run."""
    command = [sys.executable, str(EXAMPLES / "whole_model.py")]
    variables = os.environ | {"SVG_EAR_REPORT": "1", "SVG_EAR_INNER": "eager"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    table = said[said.index("site  ") : said.index("of all FLOPs")]
    assert table.count("\n") > 6
    assert table in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="needs torch 2.13")
def test_unmodified(tmp_path: Path) -> None:
    """SVG_EAR=1 alone."""
    printed, sites = run(
        "unmodified.py", tmp_path, SVG_EAR="1", SVG_EAR_MIN_TOKENS="256", SVG_EAR_DENSE_STEPS="0"
    )
    assert "[1, 4, 4, 32, 32]" in printed
    assert decisions(sites) == {"blocks.0.attn1": True, "blocks.0.attn2": False,
                                "blocks.1.attn1": True, "blocks.1.attn2": False}  # fmt: skip
