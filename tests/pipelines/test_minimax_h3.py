"""MiniMax-H3's own sampling loop, nothing told: which rows are video is read from the call, in each generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.tiny import build
from pipelines.runs import DEFAULT_SCHEDULE, UNMEASURED, expected, logged
from torch import Tensor

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

STEPS, TEXT = 10, 6


def pipeline(**options: Any) -> Any:
    """The blocks after the encoders, with a keyframe at each end."""
    from diffusers import MiniMaxH3Scheduler
    from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks

    pipe = blocks.MiniMaxH3FL2VACoreDenoiseStep().init_pipeline()
    transformer = build("minimax_h3")[0]
    transformer.compile_repeated_blocks(backend="svg_ear", options={**DEFAULT_SCHEDULE, **options})
    pipe.update_components(
        transformer=transformer,
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, text: int = TEXT, height: int = 64) -> Tensor:
    random = torch.Generator().manual_seed(0)
    out: Tensor = pipe(
        prompt_embeds=torch.randn(1, text, 16, generator=random), text_token_tags=torch.ones(text),
        condition_latents=[torch.randn(1, 24, 1, height // 16, 6, generator=random) for _ in range(2)],
        keyframe_anchors=("first", "last"), num_frames=124, height=height, width=96, num_inference_steps=STEPS,
        generator=random, output="latents",
    )  # fmt: skip
    return out


def packed_lines() -> list[str]:
    return [line for line in str(svg_ear_compile.report()).splitlines() if line.startswith("packed sequence")]


def test_sparse_after_a_tenth_of_the_steps() -> None:
    pipe = pipeline(**UNMEASURED)
    generate(pipe)
    steps = range(STEPS - 1)  # its scheduler makes one fewer
    assert logged() == [expected(steps, 1, branches=(0,), layers=2)]
    assert packed_lines() == ["packed sequence: 234 of 654 rows are video: 2 x 2 x 3 and 37 x 2 x 3"]
    generate(pipe, text=9, height=96)  # another prompt, another resolution
    assert logged() == [expected(steps, 1, branches=(0,), layers=2)]
    assert "packed sequence: 351 of 774 rows are video: 2 x 3 x 3 and 37 x 3 x 3" in packed_lines()
