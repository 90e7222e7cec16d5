"""Real pipelines, run whole: dense against svg_ear, and what the step clock makes of their calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines.tiny import TOKENS, Run, Tiny, build
from torch import Tensor
from toy import EAGER, calls, compiled

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

WHOLE = ["hunyuan_video", "cogvideox"]
BLOCKWISE = ["wan_i2v"]
LAYERS = 2
"""Of each tiny transformer, all of them with a long self attention."""
STEPS = 4
_dense: dict[str, Run] = {}


def dense(name: str) -> Run:
    """What the pipeline makes of its noise without us."""
    if name not in _dense:
        _dense[name] = build(name)()
    return _dense[name]


def whole(name: str, **options: Any) -> Tiny:
    tiny = build(name)
    tiny.pipe.transformer = compiled(tiny.pipe.transformer, {**EAGER, **options})
    return tiny


def blockwise(name: str, **options: Any) -> Tiny:
    tiny = build(name)
    tiny.pipe.transformer.compile_repeated_blocks(
        backend="svg_ear", fullgraph=True, options={**EAGER, **options}
    )
    return tiny


def rewritten() -> list[Any]:
    return [site.decision for site in svg_ear_compile.report().sites if site.decision.rewritten]


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (whole, "hunyuan_video"),
        pytest.param(whole, "cogvideox", marks=pytest.mark.slow),
        (blockwise, "wan_i2v"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_at_density_1_it_is_the_dense_pipeline(make: Any, name: str) -> None:
    tiny = make(name, density=1.0)
    run = tiny()
    assert difference(run.latents, dense(name).latents) < 1e-5, "rounding, over all steps"
    assert difference(run.frames, dense(name).frames) < 1e-4
    assert run.bar == dense(name).bar, "one line for each step"
    assert len(run.bar) == STEPS + 2
    assert calls() == (LAYERS * STEPS * tiny.guided, {})
    assert all(site.q_hint - site.num_text == TOKENS for site in rewritten())


@pytest.mark.parametrize(
    ("make", "name"),
    [(whole, "wan"), (blockwise, "ltx")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_at_a_low_density_it_is_nearly_that(make: Any, name: str) -> None:
    tiny = make(name, density=0.3)
    run = tiny()
    assert torch.isfinite(run.frames).all()
    assert run.frames.shape == dense(name).frames.shape
    assert 1e-6 < difference(run.latents, dense(name).latents) < 0.1, "blocks were skipped and compensated"
    totals = svg_ear_compile.report().totals()
    assert totals["sparse_calls"] == LAYERS * STEPS * tiny.guided
    assert totals["measured_density"] == pytest.approx(0.3, abs=0.05)
    assert not totals["fallbacks"]
