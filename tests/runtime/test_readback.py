"""The errors of a call from its sums."""

from __future__ import annotations

import math

import pytest
import torch

from svg_ear_compile.runtime.readback import Error, error_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("lost", "whole", "expected"),
    [
        ([[1.0, 9.0]], [[4.0, 6.0]], Error(1.0, math.sqrt(1.5))),
        ([[1.0], [3.0]], [[4.0], [12.0]], Error(0.5, 0.5)),
        ([[1.0, 5.0]], [[4.0, NAN]], Error(0.5, 0.5)),
        ([[1.0, NAN]], [[4.0, INF]], Error(0.5, 0.5)),
        ([[1.0, NAN]], [[4.0, 4.0]], Error(INF, INF)),
        ([[1.0, INF]], [[4.0, 4.0]], Error(INF, INF)),
        ([[1.0, 2.0]], [[NAN, INF]], Error(NAN, 0.0)),
        ([[0.0, 0.0]], [[0.0, 0.0]], Error(NAN, 0.0)),
    ],
    ids=[
        "heads",
        "batch",
        "exact NaN",
        "exact infinite",
        "NaN",
        "infinite",
        "none is known",
        "nothing there",
    ],
)
def test_what_is_not_finite(lost: list[list[float]], whole: list[list[float]], expected: Error) -> None:
    found = error_of(torch.tensor(lost, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64))
    assert found == pytest.approx(expected, nan_ok=True)
