"""benchmarks/levels.py on a toy model, and the comparison at equal cost, the tables and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmark import import_benchmark
from test_quality_benchmark import SHORT, toy_weights

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_levels_and_fixed_densities_are_measured(tmp_path: Path) -> None:
    levels, tiny_clips = import_benchmark("levels"), import_benchmark("tiny_clips")
    clips = tiny_clips.Clips("wan", toy_weights("wan", tmp_path), **{**SHORT, "clips": 2})
    turbo, fixed = levels.measure(clips, ["turbo"], [4], [0.3], [0.25])
    assert (turbo.level, turbo.asked, turbo.warm_up) == ("turbo", levels.QUALITY["turbo"], None)
    assert (fixed.level, fixed.asked, fixed.warm_up) == ("", 0.3, 0.25)
    for run in (turbo, fixed):
        assert run.sparse + sum(run.dense.values()) == 2 * 2 * 4, "layers, clips and steps"
        assert all(10 < p < 100 for p in run.psnr)
    assert fixed.dense == {"warm-up steps": 2 * 2}
    assert fixed.density == pytest.approx([0.3, 0.3], abs=0.01)
    assert fixed.cost == pytest.approx([0.25 + 0.75 * 0.3] * 2, abs=0.01)
    assert fixed.error == [None, None], "only levels are audited"
    assert all(0.01 < error < 0.3 for error in turbo.error)
    assert turbo.measured > 0
    assert turbo.cost[0] == pytest.approx(turbo.cost[1], abs=0.3), "of each clip, not of all so far"
    levels.write([turbo, fixed], tmp_path / "levels.json", clips.told())
    again = levels.read(json.loads((tmp_path / "levels.json").read_text()))
    assert [run.dense for run in again] == [turbo.dense, fixed.dense]
    assert again[0].cost == pytest.approx(turbo.cost, rel=1e-4)


def run(
    level: str, cost: float, decibels: float, asked: float = 0.0, warm_up: float | None = None, **more: Any
) -> Any:
    """Of two clips; the second is 2 dB closer and costs .02 more."""
    found = import_benchmark("levels").Run(
        "wan", 8, level, asked, warm_up, [decibels, decibels + 2], [0.9, 0.9], [cost, cost + 0.02], [cost, cost],
        [None, None], 10, 5, {},
    )  # fmt: skip
    return found._replace(**more)


def fixed(warm_up: float, *points: tuple[float, float]) -> list[Any]:
    return [run("", cost, psnr, cost, warm_up) for cost, psnr in points]


CURVES = [*fixed(0.0, (0.6, 44.0), (0.2, 30.0), (0.4, 40.0)), *fixed(0.1, (0.3, 32.0), (0.5, 40.0))]


def test_a_level_is_compared_at_its_own_cost_clip_by_clip() -> None:
    level = run("high", 0.3, 36.0, 0.02, error=[0.02, 0.04])
    before = run("high", 0.5, 40.0, 0.02)
    cheap = run("turbo", 0.1, 20.0, 0.08, error=[0.05, None])
    high, turbo = import_benchmark("equal_cost").rows_of([level, cheap, *CURVES], [before])
    # At .3 and .32 the curves have 35 and 37 dB of clips whose points lie at .2 to .4 and .22 to .42.
    assert high.fixed == {0.0: pytest.approx(36), 0.1: pytest.approx(33)}
    assert high.psnr == 37
    assert high.margin == pytest.approx(1)
    assert high.before == (pytest.approx(0.51), 41, pytest.approx(-2)), "43 dB at .5"
    assert high.gain == pytest.approx(3)
    assert high.ratios == [1, 2]
    assert (high.within(), high.within(0.0)) == (0.5, 0.5)
    assert turbo.fixed == {0.0: None, 0.1: None}, "no density was so cheap"
    assert (turbo.margin, turbo.gain, turbo.before) == (None, None, None)
    assert turbo.ratios == [pytest.approx(0.625)]
    assert (turbo.within(), turbo.within(0.0)) == (0, 1)


def test_the_last_bits_of_clips_that_are_all_but_dense_do_not_count() -> None:
    equal_cost = import_benchmark("equal_cost")
    level = run("near-lossless", 0.6, 0.0, 0.01, psnr=[math.inf, 131.0])
    (row,) = equal_cost.rows_of([level, *CURVES])
    assert row.psnr == equal_cost.MOST_DECIBELS
    assert row.within() is None, "nothing was sparse"


def test_tables_and_picture(tmp_path: Path) -> None:
    levels, plot = import_benchmark("levels"), import_benchmark("levels_plot")
    told = {
        "settings": {"model": "wan", "steps": 30, "size": [16, 128, 128], "clips": 2, "device": "cpu"},
        "hardware": "a chip", "torch": "2.11",
    }  # fmt: skip
    high, balanced = run("high", 0.3, 36.0, 0.02, error=[0.02, 0.04]), run("balanced", 0.2, 29.0, 0.04)
    levels.write([high, balanced, *CURVES], tmp_path / "wan.json", told)
    levels.write([run("high", 0.5, 40.0, 0.02)], tmp_path / "before.json", told)
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- levels -->\nold\n<!-- levels -->\nafter\n")
    plot.main([
        "--levels", str(tmp_path / "wan.json"), "--before", str(tmp_path / "before.json"),
        "--png", str(tmp_path / "picture.png"), "--page", str(page),
    ])  # fmt: skip
    printed = page.read_text()
    assert "old" not in printed
    assert "a chip, torch 2.11: size 16 x 128 x 128, clips 2\n" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert ["high", "+1.00", "+4.00", "+1.00", "+3.00", "50%", "50%"] in lines
    assert ["balanced", "-1.00", "-", "-1.00", "-", "-", "-"] in lines
    assert ["all", "+0.00", "+4.00", "-1.00", "+3.00", "50%", "50%"] in lines
    assert [
        "wan", "8", "high", "0.310", "0.300", "37.00", "36.00", "33.00", "+1.00", "0.510", "41.00", "-2.00",
        "+3.00", "1.41", "2.00",
    ] in lines  # fmt: skip
    assert (tmp_path / "picture.png").stat().st_size > 1000
