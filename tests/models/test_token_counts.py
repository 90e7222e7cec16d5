"""Calls of many sizes in one graph: each is sparse or dense for what it is, whatever came first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from models.tiny_parts import wan_arguments, wan_config
from toy import SPARSE

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("ignore:svg_ear rewrote none")]

SMALL, OTHER, LARGE, IMAGE = (3, 16, 12), (3, 18, 16), (3, 28, 24), (1, 48, 32)
LEAST = 1000


class Wan:
    """A model that is compiled block by block, or as a whole; each call says how its sites ran."""

    def __init__(self, regional: bool, dynamic: bool | None) -> None:
        torch.manual_seed(0)
        model = WanTransformer3DModel(**wan_config() | {"rope_max_seq_len": 64}).eval()
        how: dict[str, Any] = {
            "backend": "svg_ear", "fullgraph": True, "dynamic": dynamic,
            "options": {**SPARSE, "inner": "eager", "min_tokens": LEAST, "density": 0.3},
        }  # fmt: skip
        self.run: Any = model if regional else torch.compile(model, **how)
        if regional:
            model.compile_repeated_blocks(**how)

    def __call__(self, size: tuple[int, int, int]) -> tuple[int, dict[str, int]]:
        sparse, dense = self._counts()
        with torch.no_grad():
            self.run(**wan_arguments(*size))
        now = self._counts()
        return now[0] - sparse, {k: n - dense.get(k, 0) for k, n in now[1].items() if n > dense.get(k, 0)}

    def _counts(self) -> tuple[int, dict[str, int]]:
        totals = svg_ear_compile.report().totals()
        return totals["sparse_calls"], totals["dense_calls"]


@pytest.mark.parametrize(
    "regional", [pytest.param(True, id="blocks"), pytest.param(False, id="whole", marks=pytest.mark.slow)]
)
def test_large_clips_after_small_ones(regional: bool) -> None:
    model = Wan(regional, dynamic=None)
    assert model(SMALL) == (0, {}), "compiled for this size alone"
    assert model(OTHER) == (0, {"too few tokens": 2}), "compiled for all"
    assert model(LARGE) == (2, {})
    assert model(SMALL)[0] == 0


def test_blocks_of_any_size_from_the_first_call_on() -> None:
    model = Wan(regional=True, dynamic=True)
    assert model(IMAGE) == (0, {"one frame": 2}), "1,536 tokens, of no video"
    assert model(LARGE) == (2, {})
    assert model(SMALL) == (0, {"too few tokens": 2})
    sentences = [site.decision.sentence for site in svg_ear_compile.report().sites]
    assert sentences[0].endswith("; too few tokens or one frame: decided per call)")
