"""The promise of the demo, on a GPU: sparse clips look like dense ones, and compensation is why."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).parents[2]


def test_a_quarter_of_the_attention_keeps_30_db() -> None:
    """30 steps, the first 20% dense, density 0.25. Writes outputs/quality_tiny_wan.json.

    A run's file is kept as benchmarks/results/quality_tiny_wan.json.
    """
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("benchmark_quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    rows = benchmark.measure(steps=30, size=(16, 128, 128), density=0.25)
    print("\n" + benchmark.table(rows))
    settings = {"steps": 30, "size": [16, 128, 128], "density": 0.25, "device": "cuda"}
    benchmark.write(rows, ROOT / "outputs" / "quality_tiny_wan.json", settings)
    by_name = {row.name: row for row in rows}
    ours, dropped = by_name["default"], by_name["default, skipped blocks dropped"]
    assert abs(ours.density - 0.25) < 0.01
    assert statistics.mean(ours.psnr) >= 30
    assert statistics.mean(ours.psnr) >= statistics.mean(dropped.psnr) + 3
