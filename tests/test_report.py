"""What the report shows, from records made by hand."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from svg_ear_compile import announce, records, reports
from svg_ear_compile.kernels.context import SiteTotals
from svg_ear_compile.records import GraphRecord, SiteRecord
from svg_ear_compile.runtime.density import CallLog, Decision
from svg_ear_compile.runtime.readback import Sums
from svg_ear_compile.settings import resolve


def site(index: int = 0, reason: str = "REWRITTEN", **changes: Any) -> SiteRecord:
    values: dict[str, Any] = {
        "site": index, "module_path": f"blocks.{index}.attn1", "module_class": "Attention", "kind": "self",
        "batch": 1, "heads": 2, "head_dim": 64, "q_len": 1024, "k_len": 1024, "q_hint": 1024, "k_hint": 1024,
        "dtype": "float32", "mask": "none", "rewritten": reason == "REWRITTEN", "reason": reason,
        "sentence": "self attention over video tokens" if reason == "REWRITTEN" else "too few tokens (1024)",
        "hint": "" if reason == "REWRITTEN" else "lower min_tokens", "num_text": 0, "grid": None,
        "grid_source": "unknown",
    }  # fmt: skip
    return SiteRecord(**{**values, **changes})


def sums(*errors: float) -> torch.Tensor:
    """As the ops leave them, [errors,2,1,1]."""
    return torch.tensor([[[[e * e]], [[1.0]]] for e in errors])


def graph(*sites: SiteRecord, number: int = 0, options: dict[str, Any] | None = None) -> GraphRecord:
    return GraphRecord(number, resolve(options, {}), list(sites))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    announce.clear()
    records.clear()


def test_flops() -> None:
    dense = 4 * 2 * 64 * 1024 * 1024
    assert site().flops_dense == dense
    assert site().flops_planned(0.25) == dense // 4
    assert site().flops_planned(None) == dense
    assert site(reason="CROSS").flops_planned(0.25) == dense
    with_text = site(num_text=24, q_hint=1024)
    assert with_text.flops_planned(0.5) == 4 * 2 * 64 * (1024**2 - 1000**2 // 2)


def test_identical_layers_are_one_row() -> None:
    text = str(reports.report([graph(*(site(i) for i in range(30)), site(30, "TOO_FEW_TOKENS"))]))
    assert "0.0 (30x)" in text
    assert "blocks.*.attn1" in text
    assert "blocks.30.attn1" in text
    assert "30 of 31 attention sites rewritten, with 96.8% of the attention FLOPs" in text
    assert "too few tokens: lower min_tokens" in text
    assert "calls of rewritten sites" not in text


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
    totals = reports.report([record]).totals()
    assert totals["measured_density"] == pytest.approx(0.25)
    assert totals["executed_area"] == pytest.approx(0.275)
    assert totals["mean_density"] == pytest.approx((3 * 0.25 + 1) / 4)
    assert totals["dense_calls"] == {"warm-up steps": 2}
    text = str(reports.report([record]))
    assert "6 sparse, 2 dense (2 warm-up steps)" in text
    assert "density: 0.250 in sparse calls, 0.275 executed with padding, 0.438 over all calls" in text
    assert "fallbacks: 1 x fallback: ValueError" in text
    assert "steps: 1 dense first steps, of 4 (the pipeline)" in text
    assert "kernel: Triton (the faster kernel is for Hopper GPUs, sm_90; this one is sm_80)" in text


def test_a_site_that_only_ran_dense_has_mean_density_one() -> None:
    record = graph(site())
    record.dense[0]["dense layers"] = 5
    (row,) = reports.report([record]).sites
    assert (row.measured_density, row.mean_density) == (None, 1.0)


def log(
    layer: int, step: int, decision: Decision, error: float | None = None, true: float | None = None
) -> CallLog:
    measured, audited = (None if x is None else Sums(sums(x)) for x in (error, true))
    return CallLog(0, 7, layer, 0, step, decision, measured, audited)


def test_of_several_generations_the_last_is_shown_and_a_few_are_kept() -> None:
    record = graph(site())
    for generation in range(12):
        record.count({}, generation, [log(0, generation, Decision(density=0.4, measure=()), 0.02)])
    assert [e.step for e in reports.report([record]).errors()] == [11]
    assert len(record.logs) == records.MAX_GENERATIONS
    assert record.sparse[0] == 12


def test_layers_that_the_guard_made_dense_are_named() -> None:
    record = graph(site())
    guarded = Decision("its error was 0.9, more than 0.16", "error beyond max_error")
    record.count({0: guarded.counter}, 1, [log(5, 0, guarded), log(3, 0, Decision(density=0.4))])
    assert "dense because of their errors, to the end of the generation: layers 7.5 (model.layer)" in str(
        reports.report([record])
    )


def test_it_may_be_read_while_another_thread_counts() -> None:
    record, stop = graph(site()), threading.Event()

    def count() -> None:
        generation = 0
        while not stop.is_set():
            generation += 1
            record.totals_on(("cpu", generation))[0] = SiteTotals(torch.tensor([1, 1]), 1)
            record.count({}, generation, [log(0, 0, Decision(density=0.4, measure=()), 0.02)])

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(20):
            str(reports.report([record]))
    finally:
        stop.set()
        thread.join()
    assert record.sparse[0]


def test_errors_by_layer_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    record = graph(site(), options={"target_error": 0.03})
    trial = Decision("step 1 of 1 dense warm-up steps", "warm-up steps", measure=(0.1, 0.4))
    for layer in range(2):
        logs = [
            CallLog(0, 7, layer, 0, 0, trial, Sums(sums(1, 2))),
            log(layer, 1, Decision(density=0.4, measure=()), 0.02 * (layer + 1), 0.5),
            log(layer, 2, Decision(density=0.3)),
        ]
        record.count({}, 1, logs)
    report = reports.report([record])
    assert [(e.layer, e.step, e.density, e.target) for e in report.errors()] == [
        (layer, step, density, 0.03) for layer in (0, 1) for step, density in enumerate((None, 0.4, 0.3))
    ]
    assert [e.error for e in report.errors()] == pytest.approx([None, 0.02, None, None, 0.04, None])
    assert [e.true_error for e in report.errors()] == pytest.approx([None, 0.5, None, None, 0.5, None])
    totals = report.totals()
    assert (totals["measured_calls"], totals["worst_error"]) == (2, pytest.approx(0.04))
    assert totals["measured_error"] == pytest.approx(0.03)
    assert "to 0.03" in str(report)
    report.print_errors()
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        ["0", "0", "0.40:", "0.020"],
        ["1", "0", "0.40:", "0.040"],
    ]
    (data,) = json.loads(report.to_json())["graphs"]
    assert data["errors"][1]["error"] == pytest.approx(0.02)
    assert data["sites"][0]["target_error"] == 0.03


def test_json_is_versioned_and_complete() -> None:
    data = json.loads(reports.report([graph(site(), options={"preset": "svg_ear"})]).to_json())
    assert data["schema"] == reports.SCHEMA_VERSION
    (only,) = data["graphs"]
    assert only["settings"]["order"] == "kmeans"
    assert only["sources"]["order"] == "preset"
    assert only["sites"][0]["module_path"] == "blocks.0.attn1"
    assert only["sites"][0]["planned_density"] is None
    assert data["totals"]["rewritten"] == 1


def test_empty_reports_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    reports.report().print()
    assert "nothing compiled yet" in capsys.readouterr().out
    assert "1 compiled graphs, no attention in them" in str(reports.report([graph()]))
    record = graph()
    record.other_attention = ["flex_attention in blocks.0"]
    assert "flex_attention in blocks.0" in str(reports.report([record]))


def test_records_live_as_long_as_their_callables() -> None:
    def owner() -> None: ...

    def other() -> None: ...

    first, second = records.new_record(resolve({}, {})), records.new_record(resolve({}, {}))
    records.owned_by(first, owner)
    records.owned_by(second, other)
    assert records.live_records() == [first, second]
    del owner
    gc.collect()
    assert records.live_records() == [second]
    records.drop(second)
    assert records.live_records() == []


def test_nothing_rewritten_is_loud_once(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        announce.announce(graph(site(0, "TOO_FEW_TOKENS"), site(1, "TOO_FEW_TOKENS")))
    (warning,) = recwarn.list
    assert "rewrote none of 2 attention sites: 2 x too few tokens (1024) - lower min_tokens" in str(
        warning.message
    )


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (graph(), None),
        (graph(site()), None),
        (graph(site(reason="CROSS")), None),
        (graph(site(reason="TEXT")), None),
        (graph(site(reason="NO_SIGN_OF_VIDEO", q_hint=77)), None),
        (graph(site(reason="NO_SIGN_OF_VIDEO", q_hint=4608)), "rewrote none"),
        (graph(site(reason="TOO_FEW_TOKENS", q_hint=77)), "rewrote none"),
    ],
)
def test_what_is_worth_a_complaint(record: GraphRecord, expected: str | None) -> None:
    text = announce.complaint(record)
    assert text is None if expected is None else expected in (text or "")


def test_another_attention_backend_is_named() -> None:
    record = graph()
    record.other_attention = [
        "flex_attention (do this)",
        "attention that is outside of the graphs (a hook; do that)",
    ]
    text = announce.complaint(record) or ""
    assert text.endswith("but " + "; ".join(record.other_attention)), (
        "the causes that are known, and no guess"
    )


def test_switched_on_by_the_environment_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("SVG_EAR", "1")
    lines: list[str] = []
    monkeypatch.setattr(announce.log, "warning", lambda text, *args: lines.append(text % args))
    for n in (1024, 2048):
        announce.announce(graph(site(reason="TOO_FEW_TOKENS", q_hint=n)))
    assert len(lines) == 1
    assert not recwarn.list


def test_printed_once_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        announce.announce(graph(site(), options={"report": True}))
    assert capsys.readouterr().err.count("blocks.0.attn1") == 1

    record = records.new_record(resolve({"report": str(tmp_path / "report.json")}, {}))
    record.sites = [site()]
    announce.announce(record)
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["sites"] == 1
