"""Scripts that know nothing of us, run with SVG_EAR=1: what they make, and what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ONE = """
import torch
from pipelines.tiny import build

tiny = build("wan")
dense = tiny().latents
tiny.pipe.transformer = torch.compile(tiny.pipe.transformer)
got = tiny().latents
print(((got - dense).norm() / dense.norm()).item())
"""
THREE = """
import torch
from pipelines.tiny import build

def latents(steps):
    return tiny(steps=steps).latents.double().sum().item()

tiny = build("wan")
tiny.pipe.transformer = torch.compile(tiny.pipe.transformer)
whole = [latents(steps) for steps in (10, 2, 10)]
tiny = build("wan")
tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True)
print([*whole, latents(10)])
"""


def run(script: str, report: Path, **settings: str) -> tuple[Any, dict[str, Any]]:
    """What the script prints last, and the report."""
    ours = {
        "SVG_EAR": "1", "SVG_EAR_MIN_TOKENS": "64", "SVG_EAR_INNER": "eager", "SVG_EAR_STRICT": "1",
        "SVG_EAR_REPORT": str(report), "PYTHONPATH": str(Path(__file__).parents[1]), **settings,
    }  # fmt: skip
    python_path = os.pathsep.join(filter(None, [ours.pop("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **ours, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads(report.read_text())


def test_an_unmodified_script(tmp_path: Path) -> None:
    error, report = run(
        ONE,
        tmp_path / "report.json",
        SVG_EAR_DENSITY="0.3",
        SVG_EAR_DENSE_STEPS="1",
        SVG_EAR_DENSE_LAYERS="0",
    )
    assert 1e-6 < error < 0.1
    assert report["totals"]["sparse_calls"] == 2 * 2 * 3, "layers x guidance x steps"
    assert report["totals"]["dense_calls"] == {"warm-up steps": 2 * 2}


def test_with_nothing_told_every_run_is_the_first(tmp_path: Path) -> None:
    """The default schedule: 10% of the steps are dense, of 10 the first, also after a preview of 2 steps. The bits are
    those of a fresh process, compiled as a whole or block by block."""
    latents, report = run(THREE, tmp_path / "report.json")
    first, _, again, regional = latents
    assert first == again == regional
    whole, blocks = (graph for graph in report["graphs"] if any(site["rewritten"] for site in graph["sites"]))
    for graph, steps in ((whole, 10 + 2 + 10), (blocks, 10)):
        assert graph["steps"] == "1 dense first steps, of 10 (the pipeline)"
        calls = [
            (site["sparse_calls"], site["dense_calls"]["warm-up steps"], sum(site["dense_calls"].values()))
            for site in graph["sites"]
            if site["rewritten"]
        ]
        sparse, warm_up, dense = (sum(each) for each in zip(*calls, strict=True))
        assert warm_up == 2 * 2 * steps // 10, "layers x guidance x the first step of each ten"
        assert sparse + dense == 2 * 2 * steps
        assert sparse
