"""target_error on the packaged tiny Wan, from torch.compile to the report: nothing told."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import svg_ear_compile
from svg_ear_compile import tiny_wan
from svg_ear_compile.reporting import CallError, Report

pytest.importorskip("diffusers")
LAYERS, TARGET = 7, 0.08
EAGER = {"min_tokens": 1, "inner": "eager", "strict": True, "target_error": TARGET, "max_density": 0.95}


def sample(
    options: dict[str, Any], steps: int, guidance: float = 1.0, size: int = 48
) -> tuple[Tensor, Report]:
    model = tiny_wan.load_model()
    model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options={**EAGER, **options})
    noise = torch.randn(1, 3, 16, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tiny_wan.parse("a striped red star moving left, over the cat photo panning up")])
    clip = tiny_wan.sample(model, noise, ids, steps=steps, guidance=guidance)
    return clip, svg_ear_compile.report()


def sparse(report: Report) -> list[CallError]:
    return [e for e in report.errors() if not e.dense]


@pytest.mark.usefixtures("fresh")
def test_a_generation_meets_its_target_and_the_guard_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = sample({"audit": True}, steps=8, size=32)
    calls = sparse(report)
    assert len(calls) == LAYERS * 7, "one dense step of 8"
    true = [e.true_error for e in calls if e.true_error is not None]
    rms = math.sqrt(statistics.mean(error**2 for error in true))
    assert TARGET / 1.5 < rms < TARGET * 1.5
    assert "error beyond max_error" not in report.totals()["dense_calls"]
    ratios = [e.error / e.true_error for e in calls if e.error is not None and e.true_error]
    assert statistics.median(ratios) == pytest.approx(1, abs=0.15)
    assert 1 / 3 < min(ratios) < max(ratios) < 3, (
        "64 rows of each head, of which few may have most of the error"
    )
    assert all(len({e.density for e in calls if e.step == step}) == 1 for step in range(1, 8))

    totals, text = report.totals(), str(report)
    measured = [e.error for e in calls if e.error is not None]
    assert totals["measured_calls"] == len(measured)
    assert totals["worst_error"] == max(measured)
    assert "to 0.08" in text
    assert f"measured in {len(measured)} sparse calls of the last generation; target 0.08" in text
    assert "1 dense first steps, of 8" in text
    data = json.loads(report.to_json())
    assert len(data["graphs"][0]["errors"]) == LAYERS * 8
    report.print_errors()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "density: measured relative error, target 0.08"
    assert lines[1].split()[:3] == ["layer", "branch", "step"]
    assert len(lines) == 3 + LAYERS
    assert ":" in "".join(lines[3:])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_the_same_bits_twice() -> None:
    """Decisions depend on nothing but what was measured."""
    clip, report = sample({"dense_steps": 0}, 4, guidance=3.5, size=32)
    assert {e.branch for e in sparse(report)} == {0, 1}
    first = {e.density for e in sparse(report) if e.step == 0}
    assert first == {0.4}, "no warm-up: cautious until something is known"
    assert {e.density for e in sparse(report) if e.step} - first
    torch._dynamo.reset()
    again, _ = sample({"dense_steps": 0}, 4, guidance=3.5, size=32)
    assert torch.equal(clip, again)


def test_without_a_measurement_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    Report(()).print_errors()
    assert "no error was measured" in capsys.readouterr().out
