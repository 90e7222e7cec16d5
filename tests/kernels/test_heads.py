"""Numbers and places of chosen heads."""

from __future__ import annotations

import random

import pytest
import torch

from svg_ear_compile.kernels.heads import on_device


@pytest.mark.parametrize("H", [1, 3, 40, 62, 63, 130])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_numbers_and_places(H: int, share: float) -> None:
    drawn = random.Random(H)
    chosen = [drawn.random() < share for _ in range(H)]
    found = on_device(chosen, torch.device("cpu"))
    expected = [h for h in range(H) if chosen[h]]
    assert found.numbers.tolist() == expected
    assert found.places.tolist() == [expected.index(h) if h in expected else -1 for h in range(H)]
