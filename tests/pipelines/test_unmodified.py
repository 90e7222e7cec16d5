"""A script that knows nothing of us, run with SVG_EAR=1: what it makes, and what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from toy import ToyInputs, ToyVideo

def sample(model):
    torch.manual_seed(0)
    x, _, text = ToyInputs()()
    with torch.no_grad():
        for t in torch.linspace(1000, 0, 11)[:-1]:
            x = x - 0.05 * (3 * model(x, t.expand(1), text) - 2 * model(x, t.expand(1), -text))
    return x

model = ToyVideo().eval()
dense = sample(model)
got = sample(torch.compile(model))
print(((got - dense).norm() / dense.norm()).item())
"""


@pytest.mark.slow
def test_an_unmodified_script(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ours = {
        "SVG_EAR": "1", "SVG_EAR_DENSITY": "0.3", "SVG_EAR_MIN_TOKENS": "64", "SVG_EAR_INNER": "eager",
        "SVG_EAR_STRICT": "1", "SVG_EAR_REPORT": str(report), "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**clean, **ours}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 1e-6 < float(done.stdout) < 0.1
    totals = json.loads(report.read_text())["totals"]
    assert totals["dense_calls"] == {"warm-up steps": 2 * 2}, "layers x guidance x steps"
    assert totals["sparse_calls"] == 2 * 2 * 9
