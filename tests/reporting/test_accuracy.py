"""The table of measured errors."""

from __future__ import annotations

import json

import pytest
from reporting.by_hand import graph, log, site, sums

from svg_ear_compile.kernels.context import Measure
from svg_ear_compile.reporting import report
from svg_ear_compile.runtime.density import CallLog, Decision
from svg_ear_compile.runtime.readback import Sums


def test_errors_by_layer_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    record = graph(site(), options={"target_error": 0.03})
    trial = Decision("step 1 of 1 dense warm-up steps", measure=Measure(0, (0.1, 0.4)))
    for layer in range(2):
        logs = [
            CallLog(0, 7, layer, 0, 0, trial, Sums(sums(1, 2))),
            log(layer, 1, Decision(density=0.4, measure=Measure(0)), 0.02 * (layer + 1), 0.5),
            log(layer, 2, Decision(density=0.3)),
        ]
        record.count({}, 1, logs)
    shown = report([record])
    assert [(e.layer, e.step, e.density, e.target) for e in shown.errors()] == [
        (layer, step, density, 0.03) for layer in (0, 1) for step, density in enumerate((None, 0.4, 0.3))
    ]
    assert [e.error for e in shown.errors()] == pytest.approx([None, 0.02, None, None, 0.04, None])
    assert [e.true_error for e in shown.errors()] == pytest.approx([None, 0.5, None, None, 0.5, None])
    totals = shown.totals()
    assert (totals["measured_calls"], totals["worst_error"]) == (2, pytest.approx(0.04))
    assert totals["measured_error"] == pytest.approx(0.03)
    assert "to 0.03" in str(shown)
    shown.print_errors()
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["0", "0", "0.40:", "0.020"],
        ["1", "0", "0.40:", "0.040"],
    ]
    (data,) = json.loads(shown.to_json())["graphs"]
    assert data["errors"][1]["error"] == pytest.approx(0.02)
    assert data["sites"][0]["target_error"] == 0.03
