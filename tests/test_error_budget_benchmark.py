"""benchmarks/error_budget.py on a toy model, and the picture and table of several models' results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark import import_benchmark
from test_quality_benchmark import SHORT, toy_weights

from svg_ear_compile.errors import CallError


def test_a_target_and_the_density_that_it_took(tmp_path: Path) -> None:
    budget, tiny_clips = import_benchmark("error_budget"), import_benchmark("tiny_clips")
    clips = tiny_clips.Clips("wan", toy_weights("wan", tmp_path), steps=5, **{**SHORT, "clips": 2})
    rows = list(budget.measure(clips, ["0.4"]))
    steered, fixed = rows
    assert (steered.target, fixed.target) == (0.4, None)
    assert 0.05 < steered.density == pytest.approx(fixed.density, abs=0.05)
    assert len(steered.calls) == 2, "clips"
    for calls in (*steered.calls, *fixed.calls):
        assert {c.layer for c in calls} == {1}, "layer 0 is dense"
        assert all(c.true_error is not None and c.true_error > 0 for c in calls)
    assert len(budget.ratios(steered)) == sum(map(len, steered.calls)) - 2 * budget.MIN_STEPS
    assert budget.ratios(fixed) == []
    assert budget.table(rows).count("0.4") >= 2
    budget.write(rows, tmp_path / "wan.json", clips.told())
    again = budget.read(json.loads((tmp_path / "wan.json").read_text()))
    assert [row.name for row in again] == [row.name for row in rows]
    assert budget.ratios(again[0]) == pytest.approx(budget.ratios(steered), rel=1e-3)


def test_the_first_two_sparse_steps_of_each_layer_and_branch() -> None:
    def call(layer: int, branch: int, step: int) -> CallError:
        return CallError(0, 0, 0, layer, branch, step, "", 0.2, 0.1, None, None, 0.1)

    late = [call(1, 0, step) for step in (7, 4, 9, 6)]
    others = [call(1, 1, 5), call(2, 0, 5), call(2, 0, 6)]
    first, later = import_benchmark("error_budget").first_and_later([*late, *others])
    assert sorted((c.layer, c.branch, c.step) for c in first) == [
        (1, 0, 4), (1, 0, 6), (1, 1, 5), (2, 0, 5), (2, 0, 6),
    ]  # fmt: skip
    assert sorted(c.step for c in later) == [7, 9]


def test_picture_and_table_of_several_models(tmp_path: Path) -> None:
    budget, plot = import_benchmark("error_budget"), import_benchmark("error_budget_plot")

    def calls(*ratios: float) -> list[CallError]:
        """Of layer 1 at steps 2, 3, ...: the first two do not count."""
        return [
            CallError(0, 0, 0, 1, 0, 2 + i, "", 0.2, 0.1, None, None, 0.1 * ratio)
            for i, ratio in enumerate((9.0, 9.0, *ratios))
        ]

    sources = []
    for model, found in (("wan", (1.0, 1.4)), ("hunyuan", (0.5, 1.2, 2.0, 4.0))):
        rows = [budget.Row("0.1", 0.1, 0.2, 30.0, [calls(*found)]), budget.Row("fixed", None, 0.2, 30.0, [])]
        sources.append(tmp_path / f"{model}.json")
        settings = {"model": model, "steps": 30, "size": [16, 128, 128], "device": "cpu"}
        budget.write(rows, sources[-1], {"settings": settings, "hardware": "a chip", "torch": "2.11"})
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- errors -->\nold\n<!-- errors -->\nafter\n")
    plot.main([*map(str, sources), str(tmp_path / "picture.png"), str(page)])
    printed = page.read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert ["wan", "0.1", "2", "100.0%", "100.0%", "0.0%", "1.40"] in lines
    assert ["hunyuan", "0.1", "4", "25.0%", "50.0%", "25.0%", "4.00"] in lines
    assert "a chip, torch 2.11: steps 30, size 16 x 128 x 128" in printed
    assert "old" not in printed
    assert printed.endswith("<!-- errors -->\nafter\n")
    assert (tmp_path / "picture.png").stat().st_size > 1000
