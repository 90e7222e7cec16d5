"""Sampling loops without a pipeline: which calls are warm-up, and what does the report say about it?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from pipelines.runs import (
    DEFAULT_SCHEDULE,
    UNMEASURED,
    Model,
    expected,
    in_threads,
    logged,
    said,
    values,
    views,
    word,
)
from torch import Tensor
from toy import ToyInputs, ToyVideo, compiled

import svg_ear_compile
from svg_ear_compile.backend import reset
from svg_ear_compile.runtime import generations

pytestmark = pytest.mark.filterwarnings("error:svg_ear")

UNKNOWN = (
    "2 dense first steps; the number of steps is unknown outside of a pipeline: set it with "
    "svg_ear_compile.generation(num_steps=...), or the setting num_steps"
)


class PerToken(ToyVideo):
    """Each token has a timestep of its own, of those in the clip's first frame 0: they are given. Also takes [B]."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        timestep = timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep
        return super().forward(hidden_states, timestep, encoder_hidden_states)


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[Model]:
    torch._dynamo.reset()
    reset()
    yield compiled(PerToken(layers=1).eval(), {**DEFAULT_SCHEDULE, **UNMEASURED})
    torch._dynamo.reset()


@pytest.fixture
def model(compiled_once: Model) -> Model:
    """Compiled, but no generation of it was begun."""
    generations.end_all()
    return compiled_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_of_a_scheduler_show_all_from_the_first_call(model: Model, dtype: torch.dtype) -> None:
    """Rounded to half precision several are equal."""
    assert len({float(t) for t in views(20, torch.bfloat16)}) < 10
    for stop in (2, 20, 5, 20):
        assert word(model, views(20, dtype)[:stop], 2) == (".." + 18 * "s")[:stop]
    assert said() == {"2 dense first steps, of 20 (the tensor of timesteps)"}
    assert logged() == [expected(range(20), 2)]


def per_token(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, 64), t.expand(1, 192)], 1)


@pytest.mark.parametrize(
    "change",
    [lambda t: t / 1000, lambda t: 1 - t / 1000, per_token],
    ids=["falling", "rising", "per token"],
)
def test_where_only_values_show_steps_two_are_dense(model: Model, change: Callable[[Tensor], Tensor]) -> None:
    for _ in range(2):
        assert word(model, [change(t) for t in values(12)], 2) == ".." + 10 * "s"
        assert said() == {UNKNOWN}
        assert logged() == [expected(range(12), 2)]


def test_guidance_in_one_batch_may_end_in_mid_run(model: Model) -> None:
    """The model is compiled again for the smaller batch: generation, step and layer go on."""
    timesteps = views(20)
    assert word(model, timesteps[:6], batch=2) == "..ssss"
    assert word(model, timesteps[6:]) == 14 * "s"
    assert logged() == [expected(range(20), 2, [0])]


def test_calls_of_any_size_are_calls_of_one_step(model: Model) -> None:
    """Context windows, the last one shorter, with guidance in one batch or not."""
    for t in views(10):
        for batch, frames in ((1, 4), (2, 4), (1, 4), (1, 3)):
            with torch.no_grad():
                clip, _, text = ToyInputs()(frames=frames)
                model(clip.expand(batch, -1, -1, -1, -1), t, text.expand(batch, -1, -1))
    assert logged() == [expected(range(10), 1, range(4))]


def test_two_models_share_nothing(model: Model) -> None:
    """Two take the steps in turn, and the second one's schedule is shorter."""
    other = compiled(ToyVideo(layers=1).eval(), {**DEFAULT_SCHEDULE, **UNMEASURED})
    words = ["", ""]
    for first, second in zip(views(20), values(20), strict=True):
        words[0] += word(model, [first])
        words[1] += word(other, [second])
    assert words == [".." + 18 * "s"] * 2
    assert logged(2) == [expected(range(20), 2, [0])] * 2


def test_a_benchmark_is_sparse_after_two_calls_a_branch(model: Model) -> None:
    with torch.no_grad():
        for _ in range(5):
            for seed in (0, 1):
                model(*ToyInputs()(seed=seed))
    assert list(logged()[0].values()) == [False] * 4 + [True] * 6
    assert said() == {
        "no dense step: many calls at one timestep were taken for a benchmark, or a model of one step"
    }


def test_clips_of_a_model_of_one_step_become_sparse(model: Model) -> None:
    """Each has noise of its own."""
    assert word(model, [torch.tensor([1000.0])] * 40) == 32 * "." + 8 * "s"


def test_told_steps_and_branches(model: Model) -> None:
    def run() -> str:
        return word(model, values(20), 2)

    async def serve() -> str:
        with svg_ear_compile.generation(num_steps=20, branches=2):
            return await asyncio.to_thread(run)

    right = ".." + 18 * "s"
    assert asyncio.run(serve()) == right
    with svg_ear_compile.generation(num_steps=20, branches=2):
        assert in_threads(run) == [right], "in a worker that knows nothing of the caller's context"
    with svg_ear_compile.generation(num_steps=30, branches=1):
        assert word(model, [torch.tensor([5.0])] * 30) == "..." + 27 * "s", "calls are counted, not timesteps"
    assert said() == {"3 dense first steps, of 30 (generation(num_steps=...))"}


def test_generations_that_are_open_at_once(model: Model) -> None:
    """Each thread has its own."""
    turns = threading.Barrier(2, timeout=60)

    def run(steps: int) -> None:
        with svg_ear_compile.generation(num_steps=steps, branches=1):
            for _ in range(steps):
                turns.wait()
                word(model, values(1))

    in_threads(partial(run, 20), partial(run, 20))
    assert logged(2) == [expected(range(20), 2, [0])] * 2
