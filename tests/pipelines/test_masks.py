"""How often does the host read what a mask hides? It waits for the device each time."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines.test_pipelines import STEPS, blockwise, whole
from torch import Tensor

from svg_ear_compile.kernels import dense

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """(keys, how many of them are seen) of each mask that was read."""
    found: list[tuple[int, int | None]] = []
    read = dense.read_seen_keys

    def spy(mask: Tensor) -> int | None:
        found.append((mask.shape[-1], read(mask)))
        return found[-1][1]

    monkeypatch.setattr(dense, "read_seen_keys", spy)
    return found


def test_once_per_call_of_the_model(reads: list[tuple[int, int]]) -> None:
    """Both of its kinds of blocks share the mask, which the graph makes of the pipeline's own mask tensor."""
    tiny = whole("hunyuan_video", density=0.3, dense_steps=1)
    for prompt in ("a cat walks", "a cat walks a dog sleeps a cat"):
        reads.clear()
        tiny(prompt=prompt)
        assert [keys - seen for keys, seen in reads] == [8 - len(prompt.split())] * STEPS


def test_once_per_call_of_the_model_where_blocks_are_compiled_one_by_one(reads: list[Any]) -> None:
    """Double- and single-stream blocks are two graphs, which share a mask that was made outside of both."""
    blockwise("hunyuan_video", density=0.3)()
    assert len(reads) == STEPS
