"""MiniMax-H3's own sampling loop, nothing told: which rows are video is read from the call, in each generation."""

from __future__ import annotations

import pytest
import torch
from models.tiny_parts import noise
from pipelines.runs import DEFAULT_SCHEDULE, UNMEASURED, expected, logged
from pipelines.tiny_others import minimax_h3

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

STEPS = 10


def packed_lines() -> list[str]:
    return [line for line in str(svg_ear_compile.report()).splitlines() if line.startswith("packed sequence")]


def test_sparse_after_a_tenth_of_the_steps() -> None:
    tiny = minimax_h3()
    tiny.pipe.transformer.compile_repeated_blocks(
        backend="svg_ear", options={**DEFAULT_SCHEDULE, **UNMEASURED}
    )
    tiny.pipe(**tiny.arguments, num_inference_steps=STEPS)
    steps = range(STEPS - 1)  # its scheduler makes one fewer
    assert logged() == [expected(steps, 1, branches=(0,), layers=2)]
    assert packed_lines() == ["packed sequence: 234 of 656 rows are video: 2 x 2 x 3 and 37 x 2 x 3"]

    another = {"prompt_embeds": noise(1, 11, 16), "text_token_tags": torch.ones(11)}
    tiny.pipe(**tiny.arguments | another, num_inference_steps=STEPS)
    assert logged() == [expected(steps, 1, branches=(0,), layers=2)]
    assert "packed sequence: 234 of 659 rows are video: 2 x 2 x 3 and 37 x 2 x 3" in packed_lines()
