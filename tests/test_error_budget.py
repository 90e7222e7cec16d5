"""target_error on the packaged tiny Wan, from torch.compile to the report: small clips, few steps."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import svg_ear_compile
from svg_ear_compile import tiny_wan
from svg_ear_compile.errors import CallError
from svg_ear_compile.reports import Report

pytest.importorskip("diffusers")
LAYERS, TARGET = 8, 0.08
EAGER = {"min_tokens": 1, "inner": "eager", "strict": True, "target_error": TARGET}


def sample(
    options: dict[str, Any], steps: int, guidance: float = 1.0, size: int = 48
) -> tuple[Tensor, Report]:
    """Two generations would see each other; every sample has a model of its own."""
    model = tiny_wan.load_model()
    model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options={**EAGER, **options})
    noise = torch.randn(1, 3, 16, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tiny_wan.parse("a striped red star moving left, over the cat photo panning up")])
    clip = tiny_wan.sample(model, noise, ids, steps=steps, guidance=guidance)
    return clip, svg_ear_compile.report()


def sparse(report: Report) -> list[CallError]:
    return [e for e in report.errors() if not e.dense]


@pytest.mark.usefixtures("fresh")
def test_true_errors_stay_within_three_times_the_target_and_the_guard_is_silent() -> None:
    _, report = sample({"num_steps": 7, "dense_steps": 3, "audit": True}, steps=7)
    calls = sparse(report)
    assert len(calls) >= 2 * (LAYERS - 1), "there is something to see"
    late = [e.true_error for e in calls if e.step >= 5]
    assert all(error is not None and error <= 3 * TARGET for error in late)
    assert "error beyond max_error" not in report.totals()["dense_calls"]
    ratios = [e.error / e.true_error for e in calls if e.error is not None and e.true_error]
    assert statistics.median(ratios) == pytest.approx(1, abs=0.15)
    assert 1 / 3 < min(ratios) < max(ratios) < 3, (
        "64 rows of each head, of which few may have most of the error"
    )
    densities = {e.density for e in calls}
    assert len(densities) > LAYERS / 2, "each layer has its own"
    assert all(e.layer != 0 for e in calls), "which is dense throughout"

    totals, text = report.totals(), str(report)
    measured = [e.error for e in calls if e.error is not None]
    assert totals["measured_calls"] == len(measured)
    assert totals["worst_error"] == max(measured)
    assert "to 0.08" in text
    assert f"measured in {len(measured)} sparse calls of the last generation; target 0.08" in text
    data = json.loads(report.to_json())
    assert data["schema"] == 2
    assert len(data["graphs"][0]["errors"]) == LAYERS * 7


@pytest.mark.usefixtures("fresh")
def test_with_guidance_each_branch_has_its_own_control() -> None:
    """And the same bits twice: decisions depend on nothing but what was measured."""
    options = {"num_steps": 4, "dense_steps": 0, "measure_every": 1}
    clip, report = sample(options, 4, guidance=3.5, size=32)
    assert {e.branch for e in sparse(report)} == {0, 1}
    first = [e for e in sparse(report) if e.step < 2]
    assert {e.density for e in first} == {0.4}, "no warm-up: cautious until something is known"
    assert {e.density for e in sparse(report) if e.step >= 2} - {0.4}
    torch._dynamo.reset()
    again, _ = sample(options, 4, guidance=3.5, size=32)
    assert torch.equal(clip, again)


@pytest.mark.usefixtures("fresh")
def test_print_errors(capsys: pytest.CaptureFixture[str]) -> None:
    sample({"num_steps": 3, "dense_steps": 1, "max_density": 1.0}, 3, size=32)[1].print_errors()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "density: measured relative error, target 0.08"
    assert lines[1].split() == ["layer", "branch", "step", "2", "step", "3"]
    assert len(lines) == 3 + LAYERS
    assert lines[3].split() == ["0", "0", "dense", "dense"]
    assert lines[4].split()[:3] == ["1", "0", "0.40:"]


def test_without_a_measurement_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    svg_ear_compile.reports.report([]).print_errors()
    assert "no error was measured" in capsys.readouterr().out
