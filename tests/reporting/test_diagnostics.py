"""Who hears of a compiled graph, and how often."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
from reporting.by_hand import graph, log, site
from torch import nn

from svg_ear_compile.precedence import resolve
from svg_ear_compile.reporting import GraphRecord, diagnostics, records
from svg_ear_compile.runtime.density import Decision


def test_nothing_rewritten_is_loud_once(recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(2):
        diagnostics.announce(graph(site(0, "TOO_FEW_TOKENS"), site(1, "TOO_FEW_TOKENS")))
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
    text = diagnostics.complaint(record)
    assert text is None if expected is None else expected in (text or "")


def test_another_attention_backend_is_named() -> None:
    record = graph()
    record.other_attention = [
        "flex_attention (do this)",
        "attention that is outside of the graphs (a hook; do that)",
    ]
    text = diagnostics.complaint(record) or ""
    assert text.endswith("but " + "; ".join(record.other_attention)), (
        "the causes that are known, and no guess"
    )


def test_switched_on_by_the_environment_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("SVG_EAR", "1")
    lines: list[str] = []
    monkeypatch.setattr(diagnostics.log, "warning", lambda text, *args: lines.append(text % args))
    for n in (1024, 2048):
        diagnostics.announce(graph(site(reason="TOO_FEW_TOKENS", q_hint=n)))
    assert len(lines) == 1
    assert not recwarn.list


def test_printed_once_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        diagnostics.announce(graph(site(), options={"report": True}))
    assert capsys.readouterr().err.count("blocks.0.attn1") == 1

    record = records.new_record(resolve({"report": str(tmp_path / "report.json")}, {}))
    record.sites = [site()]
    diagnostics.announce(record)
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["sites"] == 1


def test_a_model_that_is_gone_at_exit_stays_in_its_report(tmp_path: Path) -> None:
    path, owner = tmp_path / "report.json", nn.Module()
    record = records.new_record(resolve({"report": str(path)}, {}))
    record.sites = [site()]
    record.owner = weakref.ref(owner)
    diagnostics.announce(record)
    record.count({}, 1, [log(0, 1, Decision(density=0.5))])
    del owner
    assert not records.live_records()
    diagnostics._write_all()
    assert json.loads(path.read_text())["totals"]["sparse_calls"] == 1
    diagnostics.clear()
    diagnostics._write_all()
    assert json.loads(path.read_text())["totals"]["sparse_calls"] == 1, (
        "after a reset there is nothing to write"
    )
