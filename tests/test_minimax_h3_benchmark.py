"""benchmarks/minimax_h3.py on a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark import import_benchmark

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow


def test_a_ratio_stands_where_all_blocks_ran_sparse(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    import_benchmark("minimax_h3").main(f"--tiny --device cpu --seconds 5 --rounds 1 --json {path}".split())
    dense, *sparse = json.loads(path.read_text())["records"]
    assert (dense["error"], dense["speed-up"]) == (0, 1)
    assert (dense["rows"], dense["video"]) == (942, 38 * 6)
    for row in sparse:
        assert isinstance(row["speed-up"], float), "sparse"
        assert row["error"] > 0
