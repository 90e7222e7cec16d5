"""benchmarks/measuring.py without a GPU: which calls a generation has, and what they add."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmark import import_benchmark

from svg_ear_compile.settings import Settings


def test_every_layer_chooses_once_and_few_calls_are_measured() -> None:
    benchmark = import_benchmark("measuring")
    steps = benchmark.calls_of_a_generation()
    calls = sum(steps, Counter())
    assert len(steps) == benchmark.STEPS
    assert all(step.total() == benchmark.LAYERS * benchmark.BRANCHES for step in steps)
    assert calls[benchmark.CHOOSING_DENSE] + calls[benchmark.CHOOSING] == benchmark.LAYERS
    sparse = calls[benchmark.PLAIN] + calls[benchmark.MEASURED] + calls[benchmark.CHOOSING]
    assert sparse > 0.8 * calls.total(), "errors that meet the target need no dense steps but the first"
    assert calls[benchmark.MEASURED] == pytest.approx(sparse / Settings().measure_every, rel=0.1)


def test_what_choosing_and_measuring_add() -> None:
    benchmark = import_benchmark("measuring")
    dense, choosing, plain, measured, _ = benchmark.KINDS
    times = dict(zip(benchmark.KINDS, (100.0, 160.0, 20.0, 21.0, 50.0), strict=True))
    found = benchmark.of_a_generation(
        times, [Counter({dense: 1, choosing: 1}), Counter({plain: 9, measured: 1})]
    )
    assert found == pytest.approx(
        {"of a generation": 61 / 400, "choosing": 60 / 400, "measuring": 1 / 400, "longest step": 1.3}
    )
