"""Does a clip depend on what ran before it, beside it, or in which thread? Not by a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from pipelines.runs import (
    BLOCKWISE,
    WHOLE,
    after,
    generate,
    in_threads,
    logged,
    make,
    sharing,
    stop,
)
from pipelines.tiny import Tiny
from torch import Tensor

import svg_ear_compile
from svg_ear_compile.backend import reset

pytestmark = pytest.mark.filterwarnings("error:svg_ear")

STEPS = 8
SIZE = {"height": 64, "width": 64}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "density": (WHOLE, {"order": "splits"}),
    "quality": (BLOCKWISE, {"density": None, "quality": "turbo", "max_density": 0.95}),
}


def clip(tiny: Tiny, **changes: Any) -> Tensor:
    return generate(tiny, STEPS, **{**SIZE, **changes})


@pytest.fixture(scope="module", params=SETTINGS)
def alone(request: pytest.FixtureRequest) -> Iterator[tuple[Tiny, Tensor]]:
    """A pipeline, compiled once for each of the settings, and its clip before anything else has run."""
    torch._dynamo.reset()
    reset()
    how, options = SETTINGS[request.param]
    tiny = make("wan", how, **options)
    latents = clip(tiny)
    assert [call for call, sparse in logged()[-1].items() if not sparse] == [(0, 0, b, 0) for b in (0, 1)]
    assert svg_ear_compile.report().totals()["measured_calls"], "it learns as it goes"
    yield tiny, latents
    torch._dynamo.reset()


def between(tiny: Tiny, other: Callable[[Tiny], Any]) -> Tensor:
    """After each step another pipeline of the same model does something."""
    beside = sharing(tiny)

    def callback(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        other(beside)
        return tensors

    return clip(tiny, callback_on_step_end=callback)


def after_a_fresh_start(tiny: Tiny) -> Tensor:
    torch._dynamo.reset()
    return clip(tiny)


def after_a_preview(tiny: Tiny) -> Tensor:
    generate(tiny, 4, seed=1, **SIZE)
    return clip(tiny)


def after_an_interrupted_run(tiny: Tiny) -> Tensor:
    clip(tiny, seed=1, **after(4, stop))
    return clip(tiny)


def around_the_steps_of_another(tiny: Tiny) -> Tensor:
    return between(tiny, lambda beside: generate(beside, 1, seed=1, **SIZE))


def in_another_thread(tiny: Tiny) -> Tensor:
    return in_threads(partial(clip, tiny))[0]


def beside_two_others(tiny: Tiny) -> Tensor:
    seeds = (0, 1, 2)
    return in_threads(*(partial(clip, sharing(tiny), seed=seed) for seed in seeds))[0]


@pytest.mark.parametrize(
    "run",
    [
        after_a_preview,
        after_an_interrupted_run,
        around_the_steps_of_another,
        pytest.param(in_another_thread, marks=pytest.mark.slow),
        beside_two_others,
        after_a_fresh_start,
    ],
    ids=lambda run: run.__name__,
)
def test_a_clip_has_the_bits_that_it_has_alone(
    alone: tuple[Tiny, Tensor], run: Callable[[Tiny], Tensor]
) -> None:
    tiny, latents = alone
    assert torch.equal(run(tiny), latents)
