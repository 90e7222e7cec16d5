"""Which calls of real pipelines are warm-up: guidance in two calls or one, later generations, two models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines.tiny import Tiny, build
from toy import EAGER, calls, compiled

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

LAYERS = 2
WHOLE, BLOCKWISE = "whole", "blockwise"


def make(name: str, how: str, **options: Any) -> Tiny:
    tiny, options = build(name), {**EAGER, **options}
    for part in ("transformer", "transformer_2"):
        model = getattr(tiny.pipe, part, None)
        if model is not None and how == WHOLE:
            setattr(tiny.pipe, part, compiled(model, options))
        elif model is not None:
            model.compile_repeated_blocks(backend="svg_ear", fullgraph=True, options=options)
    return tiny


def steps(tiny: Tiny, *counts: int, guided: int | None = None, **changes: Any) -> tuple[float, float]:
    """(sparse, dense) model calls per guided call of these generations: steps, if the clock is right."""
    sparse, dense = calls()
    for count in counts:
        tiny(count, **changes)
    after, warm = calls()
    assert set(warm) <= {"warm-up steps"}
    per_step = LAYERS * (tiny.guided if guided is None else guided)
    return (after - sparse) / per_step, (sum(warm.values()) - sum(dense.values())) / per_step


def said() -> set[str]:
    return {graph.steps for graph in svg_ear_compile.report().graphs if graph.steps}


@pytest.mark.parametrize(
    ("name", "how"),
    [("hunyuan_video", BLOCKWISE), ("cogvideox", WHOLE)],
)
def test_a_count_of_steps_in_every_generation(name: str, how: str) -> None:
    tiny = make(name, how, dense_steps=1)
    assert steps(tiny, 4) == (3, 1)
    assert steps(tiny, 4, 6) == (8, 2)
    assert steps(tiny, 4, height=96) == (3, 1), "at another resolution"
    assert steps(tiny, 4) == (3, 1), "and back"


@pytest.mark.parametrize(("name", "how"), [("wan", BLOCKWISE), ("ltx", WHOLE)])
def test_a_fraction_of_steps_known_from_the_generation_before(name: str, how: str) -> None:
    tiny = make(name, how, dense_steps=0.5)
    steps(tiny, 4)
    assert steps(tiny, 4) == (2, 2)
    assert said() == {"2 dense first steps, of 4 (the previous generation)"}
    assert steps(tiny, 6) == (4, 2), "it learns of more steps when they have come"
    assert steps(tiny, 6) == (3, 3)


def test_few_steps_do_not_all_go_into_the_warm_up() -> None:
    """With the default fraction, which of the 50 steps assumed would be 10."""
    tiny = make("wan", WHOLE, dense_steps=0.2)
    assert steps(tiny, 4) == (2, 2), "the third timestep shows that there are about four"
    assert said() == {"2 dense first steps, of 4 (the timesteps so far)"}
    assert steps(tiny, 4) == (3, 1)
    assert said() == {"1 dense first steps, of 4 (the previous generation)"}


def test_many_steps_show_in_mid_generation() -> None:
    tiny = make("wan", WHOLE, dense_steps=0.2)
    assert steps(tiny, 18) == (10, 8), "the first 10 of 50, until the ninth timestep shows that there are 18"
    assert said() == {"8 dense first steps, of 18 (the timesteps so far)"}
    assert steps(tiny, 18) == (14, 4)


def test_a_fraction_of_steps_that_were_set() -> None:
    tiny = make("wan", WHOLE, dense_steps=0.5, num_steps=4)
    assert steps(tiny, 4, 4) == (4, 4)
    assert said() == {"2 dense first steps, of 4 (the setting num_steps)"}


def test_guidance_may_come_and_go() -> None:
    tiny = make("wan", BLOCKWISE, dense_steps=1)
    assert steps(tiny, 4, guided=1, guidance_scale=1.0) == (3, 1)
    assert steps(tiny, 4) == (3, 1)
    assert steps(tiny, 4, guided=1, guidance_scale=1.0) == (3, 1)


def test_the_second_transformer_takes_no_warm_up() -> None:
    tiny = make("wan22", WHOLE, dense_steps=1)
    boundary = tiny.pipe.config.boundary_ratio * 1000
    assert steps(tiny, 4) == (3, 1)
    assert any(t < boundary for t in tiny.pipe.scheduler.timesteps)
    assert any(t >= boundary for t in tiny.pipe.scheduler.timesteps[1:]), "the first has sparse steps too"
    assert steps(tiny, 4) == (3, 1)


def test_offloaded_blocks_with_the_helper() -> None:
    """Without it the clock may not see the timestep embedding: hooks hide the names of arguments."""
    from diffusers.hooks import apply_group_offloading

    tiny, cpu = build("wan"), torch.device("cpu")
    apply_group_offloading(
        tiny.pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="block_level",
        num_blocks_per_group=1,
    )  # fmt: skip
    tiny.pipe.transformer.compile_repeated_blocks(backend="svg_ear", options={**EAGER, "dense_steps": 0.25})
    for _ in range(2):
        with svg_ear_compile.generation(num_steps=4, branches=2):
            assert steps(tiny, 4) == (3, 1)


def test_true_guidance_of_hunyuan_video() -> None:
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": "blurred", "guided": 2}
    assert steps(make("hunyuan_video", WHOLE, dense_steps=1), 4, 4, **guidance) == (6, 2)


def test_true_guidance_of_hunyuan_video_block_by_block_needs_the_helper() -> None:
    """Its timestep embedding holds pooled text, so the two calls of a step look like two steps."""
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": "blurred", "guided": 2}
    tiny = make("hunyuan_video", BLOCKWISE, dense_steps=0.25)
    for _ in range(2):
        with svg_ear_compile.generation(num_steps=4, branches=2):
            assert steps(tiny, 4, **guidance) == (3, 1)
    assert "generation(num_steps=..., branches=2)" in str(svg_ear_compile.report())
