"""A script that knows nothing of us, run with SVG_EAR=1: what it makes, and what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from pipelines.tiny import build

tiny = build("wan")
dense = tiny().latents
tiny.pipe.transformer = torch.compile(tiny.pipe.transformer)
got = tiny().latents
print(((got - dense).norm() / dense.norm()).item())
"""


def test_an_unmodified_script(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ours = {
        "SVG_EAR": "1", "SVG_EAR_DENSITY": "0.3", "SVG_EAR_MIN_TOKENS": "64", "SVG_EAR_DENSE_STEPS": "1",
        "SVG_EAR_DENSE_LAYERS": "0", "SVG_EAR_INNER": "eager", "SVG_EAR_STRICT": "1",
        "SVG_EAR_REPORT": str(report), "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**clean, **ours}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 1e-6 < float(done.stdout) < 0.1
    totals = json.loads(report.read_text())["totals"]
    assert totals["sparse_calls"] == 2 * 2 * 3, "layers x guidance x steps"
    assert totals["dense_calls"] == {"warm-up steps": 2 * 2}
