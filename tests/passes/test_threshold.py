"""The thresholds say what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svg_ear_compile.passes import threshold
from svg_ear_compile.passes.threshold import MEASURED, MIN_TOKENS, least_tokens

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "attention_h200.json"


def records() -> list[dict]:
    return json.loads(RESULTS.read_text())["records"]


def head_dim(record: dict) -> int:
    return int(record["heads x d"].split(" x ")[1])


@pytest.mark.parametrize("record", records(), ids=lambda r: f"{r['shape']} {r['density']}")
def test_a_call_is_sparse_where_that_was_faster(record: dict) -> None:
    is_faster = record["total ms"] < record["dense ms"]
    assert (record["tokens"] >= MEASURED[9, 0, head_dim(record)]) == is_faster


def test_a_threshold_lies_above_where_both_cost_the_same() -> None:
    """Interpolated between the longest length that lost and the shortest that won, at each density."""
    same = [r for r in records() if head_dim(r) == 64]
    for density in {r["density"] for r in same}:
        short, long = sorted((r for r in same if r["density"] == density), key=lambda r: r["tokens"])
        low, high = (math.log(r["dense ms"] / r["total ms"]) for r in (short, long))
        even = short["tokens"] * (long["tokens"] / short["tokens"]) ** (-low / (high - low))
        assert short["tokens"] < even < MEASURED[9, 0, 64] < long["tokens"]


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "least"),
    [
        ("cuda", torch.bfloat16, 64, MEASURED[9, 0, 64]),
        ("cuda", torch.float16, 128, MEASURED[9, 0, 128]),
        ("cuda", torch.bfloat16, 96, MIN_TOKENS),
        ("cuda", torch.float32, 64, MIN_TOKENS),
        ("cpu", torch.bfloat16, 64, MIN_TOKENS),
    ],
)
def test_least_tokens(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, dim: int, least: int
) -> None:
    monkeypatch.setattr(threshold.torch.cuda, "get_device_capability", lambda _: (9, 0))
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 24, 8192, dim))
    assert least_tokens(query) == least  # type: ignore[arg-type]
    monkeypatch.setattr(threshold.torch.version, "hip", "7.0")  # MI250 reports 9.0, too
    assert least_tokens(query) == MIN_TOKENS  # type: ignore[arg-type]
