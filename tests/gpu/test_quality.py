"""The promise of the demo, on a GPU: sparse clips look like dense ones, and compensation is why."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).parents[2]


def test_a_quarter_of_the_attention_keeps_30_db(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps, the first 20% dense, density 0.25. Writes outputs/quality_tiny_wan.json."""
    pytest.importorskip("diffusers")
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark, tiny_clips = (importlib.import_module(name) for name in ("quality", "tiny_clips"))
    clips = tiny_clips.Clips(clips=2)
    rows = list(benchmark.measure(clips, (0.25,), ("default", "default, skipped blocks dropped")))
    print("\n" + benchmark.table(rows))
    benchmark.write(rows, ROOT / "outputs" / "quality_tiny_wan.json", clips.told())
    by_name = {row.name: row for row in rows}
    ours, dropped = by_name["default"], by_name["default, skipped blocks dropped"]
    assert abs(ours.density - 0.25) < 0.01
    assert statistics.mean(ours.psnr) >= 30
    assert statistics.mean(ours.psnr) >= statistics.mean(dropped.psnr) + 3
