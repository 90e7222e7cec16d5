"""Routing without a sort equals routing with one, under Triton's interpreter (see test_attention.py)."""

from __future__ import annotations

import pytest
import torch
from routing import case, check

from svg_ear_compile.kernels.probe.triton import RowScores
from svg_ear_compile.kernels.routing import torch as route
from svg_ear_compile.kernels.routing import triton as triton_route


@pytest.mark.parametrize(
    "errors",
    [
        "ties",
        "bad",
        *(pytest.param(errors, marks=pytest.mark.slow) for errors in ("random", "equal", "zeros")),
    ],
)
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_one_budget(equal, errors):
    masked, density = (False, 0.3) if equal else (True, 0.55)
    check(case(equal=equal, errors=errors, masked=masked), "output_error", density)


@pytest.mark.parametrize("density", [0.0, 0.004, 0.1, 0.97, 1.0])
def test_densities(density):
    check(case((1, 2, 5, 9), (0, 0)), "output_error", density)


def test_more_blocks_than_one_program_takes():
    check(case((1, 2, 40, 140), (1, 3), errors="ties"), "output_error", 0.4)


def test_nothing_but_text_and_no_key_at_all():
    check(case((1, 1, 2, 2), (1, 1)), "output_error", 0.5)
    empty = case((1, 1, 3, 4), (0, 0))
    nothing = empty._replace(key_offsets=torch.zeros_like(empty.key_offsets))
    check(nothing, "output_error", 0.5)


@pytest.mark.parametrize(
    ("routing", "density"),
    [("svg_ear", 0.3), ("svg_ear", None), ("mass", 0.3), ("mass", None)],
)
def test_lists_of_what_is_chosen_elsewhere(routing, density):
    check(case(masked=True, errors="bad"), routing, density)
    check(case(equal=False), routing, density, compensate=False)


@pytest.mark.parametrize("routing", ["output_error", "svg_ear"])
def test_rows_are_brought_to_one_scale(routing):
    of = case((1, 2, 9, 12), (1, 2))
    g = torch.Generator().manual_seed(1)
    parts = 5 * torch.randn(1, 2, 3, 9, generator=g)
    parts[0, 0, 1, 2] = -torch.inf
    if routing == "output_error":
        parts[0, 1, 1, 3] = torch.nan
    rows = RowScores(*of.scores, parts)
    shift = triton_route.shift_of(rows, routing)
    expected = 2 * (parts.logsumexp(2) if routing == "output_error" else parts.amax(2))
    torch.testing.assert_close(shift, expected, equal_nan=True)
    finished = triton_route.finished(rows, of.key_offsets, routing)
    torch.testing.assert_close(finished.error, of.scores.error - expected[..., None], equal_nan=True)
    got = triton_route.select(rows, *of[1:], routing, 0.3, True)
    want = route.select(finished, *of[1:], routing, 0.3, True)
    assert torch.equal(got.kept_count, want.kept_count)
    assert torch.equal(got.areas, want.areas)


def test_areas_beyond_32_bits():
    of = case((1, 2, 4, 6), (0, 0), errors="ties")
    huge = [torch.arange(n + 1, dtype=torch.int32).expand(1, 2, -1) * 75_600 for n in (4, 6)]
    for density in (0.3, 0.8):
        check(of._replace(query_offsets=huge[0], key_offsets=huge[1]), "output_error", density)
