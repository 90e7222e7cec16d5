"""Routing without a sort, on a GPU and at real sizes: what the sorting one chooses, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from routing import case, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("errors", ["random", "ties", "equal", "zeros", "bad"])
@pytest.mark.parametrize("equal", [True, False], ids=["tiles", "clusters"])
def test_one_budget(equal, errors):
    for masked, density in ((False, 0.0), (False, 0.15), (True, 0.55), (False, 1.0)):
        check(case((2, 3, 40, 140), (1, 3), equal=equal, errors=errors, masked=masked, device="cuda"),
              "output_error", density)  # fmt: skip


@pytest.mark.parametrize("errors", ["random", "ties"])
def test_as_many_blocks_as_wan_720p_has(errors):
    check(case((1, 8, 591, 1182), (0, 0), errors=errors, device="cuda"), "output_error", 0.15)


@pytest.mark.parametrize(
    ("routing", "density"),
    [("svg_ear", 0.3), ("svg_ear", None), ("mass", 0.3), ("mass", None)],
)
def test_lists_of_what_is_chosen_elsewhere(routing, density):
    check(case((1, 4, 200, 700), (1, 3), masked=True, errors="bad", device="cuda"), routing, density)
    check(case((2, 3, 40, 140), equal=False, device="cuda"), routing, density, compensate=False)
