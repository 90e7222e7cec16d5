"""The table and the JSON of a report."""

from __future__ import annotations

import json

import pytest
import torch
from reporting.by_hand import graph, log, site

from svg_ear_compile.kernels.context import SiteTotals
from svg_ear_compile.reporting import report
from svg_ear_compile.reporting.table import SCHEMA_VERSION
from svg_ear_compile.runtime.density import Decision


def test_identical_layers_are_one_row() -> None:
    text = str(report([graph(*(site(i) for i in range(30)), site(30, "TOO_FEW_TOKENS"))]))
    assert "0.0 (30x)" in text
    assert "blocks.*.attn1" in text
    assert "blocks.30.attn1" in text
    assert "30 of 31 attention sites rewritten, with 96.8% of the attention FLOPs" in text
    assert "the plan computes" not in text, "the density follows from errors"
    assert "too few tokens: lower min_tokens" in text
    assert "calls of rewritten sites" not in text


def test_a_fixed_density_says_what_the_plan_computes() -> None:
    text = str(report([graph(site(), options={"density": 0.25})]))
    assert (
        "1 of 1 attention sites rewritten, with 100.0% of the attention FLOPs; the plan computes 25.0%"
        in text
    )


def test_report_only_says_what_would_be_rewritten() -> None:
    text = str(report([graph(site(0, "REPORT_ONLY"), site(1, "CROSS"))]))
    assert "1 of 2 attention sites would be rewritten, with 50.0% of the attention FLOPs" in text


def test_run_time_counts() -> None:
    record = graph(site(0), site(1))
    for index in (0, 1):
        record.sparse[index] = 3
        record.dense[index]["warm-up steps"] = 1
    record.totals_on("cpu")[0] = SiteTotals(torch.tensor([300, 330]), 1200)
    record.totals_on("cpu")[1] = SiteTotals(torch.tensor([300, 330]), 1200)
    record.fallbacks["fallback: ValueError"] += 1
    record.steps = "1 dense first steps, of 4 (the pipeline)"
    record.kernels = ["Triton (the faster kernel is for Hopper GPUs, sm_90; this one is sm_80)"]
    totals = report([record]).totals()
    assert totals["measured_density"] == pytest.approx(0.25)
    assert totals["executed_area"] == pytest.approx(0.275)
    assert totals["mean_density"] == pytest.approx((3 * 0.25 + 1) / 4)
    assert totals["dense_calls"] == {"warm-up steps": 2}
    text = str(report([record]))
    assert "6 sparse, 2 dense (2 warm-up steps)" in text
    assert "density: 0.250 in sparse calls, 0.275 executed with padding, 0.438 over all calls" in text
    assert "fallbacks: 1 x fallback: ValueError" in text
    assert "steps: 1 dense first steps, of 4 (the pipeline)" in text
    assert "kernel: Triton (the faster kernel is for Hopper GPUs, sm_90; this one is sm_80)" in text


def test_a_site_that_only_ran_dense_has_mean_density_one() -> None:
    record = graph(site())
    record.dense[0]["dense layers"] = 5
    (row,) = report([record]).sites
    assert (row.measured_density, row.mean_density) == (None, 1.0)


def test_layers_that_the_guard_made_dense_are_named() -> None:
    record = graph(site())
    guarded = Decision("its error was 0.9, more than 0.16", counter="error beyond max_error")
    record.count({0: guarded.counter}, 1, [log(5, 0, guarded), log(3, 0, Decision(density=0.4))])
    assert "dense for the rest of the generation because of their errors: layers 7.5 (model.layer)" in str(
        report([record])
    )


def test_json_is_versioned_and_complete() -> None:
    data = json.loads(report([graph(site(), options={"preset": "svg_ear"})]).to_json())
    assert data["schema"] == SCHEMA_VERSION
    (only,) = data["graphs"]
    assert only["settings"]["order"] == "kmeans"
    assert only["sources"]["order"] == "preset"
    assert only["sites"][0]["module_path"] == "blocks.0.attn1"
    assert only["sites"][0]["planned_density"] is None
    assert data["totals"]["rewritten"] == 1


def test_empty_reports_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    report().print()
    assert "nothing compiled yet" in capsys.readouterr().out
    assert "1 compiled graphs, no attention in them" in str(report([graph()]))
    record = graph()
    record.other_attention = ["flex_attention in blocks.0"]
    assert "flex_attention in blocks.0" in str(report([record]))
