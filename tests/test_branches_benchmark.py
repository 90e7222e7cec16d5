"""benchmarks/branches.py on a toy model."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import import_benchmark
from test_quality_benchmark import SHORT, toy_weights


def test_each_branch_has_its_share(tmp_path: Path) -> None:
    branches, tiny_clips = import_benchmark("branches"), import_benchmark("tiny_clips")
    weights = toy_weights("wan", tmp_path)
    clips = tiny_clips.Clips("wan", weights, steps=3, **{**SHORT, "guidance": 2.0})
    more, equal = branches.measure(clips, 0.3, (1.5, 1.0))
    assert (more["caption"], more["empty caption"]) == (pytest.approx(0.45), pytest.approx(0.15))
    assert (equal["caption"], equal["empty caption"]) == (0.3, 0.3)
    assert all(row["density"] == pytest.approx(0.3, abs=0.01) for row in (more, equal))
    assert 10 < more["PSNR dB"] != equal["PSNR dB"] > 10
