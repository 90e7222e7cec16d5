"""benchmarks/roofline.py: work and bytes of a call, counted from its shape."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import import_benchmark

pytest.importorskip("matplotlib")


def test_stages_of_a_call(tmp_path: Path) -> None:
    roofline = import_benchmark("roofline")
    record = {"shape": "Wan 14B 720p", "density": 0.15, "executed": 0.15, "total ms": 40.0}
    record |= {f"{stage} ms": 30.0 for stage in ("permute", "probe", "rest", "attend")}
    found = {name: work for name, *work in roofline.stages(record)}
    tokens, head = 75_600, 40 * 128
    assert found["permute"][:2] == [0, 5 * 2 * tokens * head]
    exact, centroids = 0.15 * tokens, 1182
    assert found["attend"][0] == pytest.approx(4 * tokens * (exact + centroids) * head)
    assert all(seconds == 0.03 for *_, seconds in found.values())
    rows = roofline.table([record], roofline.PEAK_BYTES["H100"])
    assert [row[1] for row in rows] == ["permute", "probe", "rest", "attend", "the call"]
    assert rows[-1][5] == pytest.approx(sum(row[5] for row in rows[:-1]))
    assert all(0 < row[6] < 1 for row in rows), "nothing is faster than its limit"
    roofline.picture([record], roofline.PEAK_BYTES["H100"], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
