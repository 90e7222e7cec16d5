"""Step, generation and branch of each call: loops of pipelines, and loops that only their timesteps show."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtime.callers import Model, Pipeline, callable_of
from torch import Tensor

import svg_ear_compile
from svg_ear_compile.runtime import generations, own_loops, step_clock
from svg_ear_compile.runtime.caller import caller


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    generations.end_all()
    yield
    generations.end_all()


class Spy:
    """A graph that notes where each call stands: (generation, step, number of steps, branch)."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.seen = number, []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        generation, calls = step_clock.tick(caller(), self.number)
        self.seen.append((generation.number, generation.step, generation.num_steps, calls.branch))
        self.last = generation
        return x

    def steps(self) -> list[int]:
        return [step for _, step, _, _ in self.seen]

    def generations(self) -> int:
        return len({number for number, *_ in self.seen})


X = torch.zeros(1, 16, 8)


def own_loop(model: Model, timesteps: Any, calls: int = 1, x: Tensor = X) -> None:
    for t in timesteps:
        for _ in range(calls):
            model(x + torch.rand(()), t if isinstance(t, Tensor) else torch.tensor([float(t)]))


def test_a_pipeline_shows_step_number_of_steps_and_branch_from_the_first_call() -> None:
    spy = Spy()
    Pipeline(Model(spy, spy))(3)
    assert [seen[1:] for seen in spy.seen] == [
        (step, 3, branch) for step in range(3) for branch in range(2) for _ in range(2)
    ]
    assert spy.generations() == 1


def test_each_call_of_a_pipeline_is_a_generation() -> None:
    spy, others = Spy(), Spy(1)
    pipeline, other = Pipeline(Model(spy)), Pipeline(Model(others))
    pipeline(2)
    pipeline(4, each=lambda i: other(2) if i == 1 else setattr(pipeline, "interrupt", i >= 2))
    pipeline(1, guided=1)
    assert spy.steps() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0]
    assert spy.generations() == 3
    assert (others.steps(), others.generations()) == ([0, 0, 1, 1], 1)


def test_guidance_may_be_switched_off_in_mid_run() -> None:
    """The line of the loop tells branches apart, not their order."""
    spy = Spy()
    model = Model(spy)

    class Pipe(Pipeline):
        def __call__(self, steps: int) -> None:  # type: ignore[override]
            timesteps = self.scheduler.timesteps = torch.linspace(1000, 100, steps)
            for i, t in enumerate(timesteps):
                if i < 2:
                    model(X, t.expand(1))  # unconditional
                model(X, t.expand(1))

    Pipe(model)(4)
    assert [branch for *_, branch in spy.seen] == [0, 1, 0, 1, 1, 1]


def test_two_models_share_a_generation_and_know_their_own_layers() -> None:
    first, second = Spy(), Spy()
    Pipeline(Model(first), Model(second))(4, guided=1)
    assert first.steps() + second.steps() == [0, 1, 2, 3]
    assert first.seen[0][0] == second.seen[0][0]


def test_context_windows_of_any_number_are_calls_of_one_step() -> None:
    spy = Spy()
    model = Model(spy, spy)

    class Pipe(Pipeline):
        def __call__(self, steps: int) -> None:  # type: ignore[override]
            timesteps = self.scheduler.timesteps = torch.linspace(1000, 100, steps)
            for _, t in enumerate(timesteps):
                for window in range(10):
                    model(X[:, : 8 + window % 3], t.expand(1))

    Pipe(model)(2)
    assert [branch for *_, branch in spy.seen] == [n for _ in range(2) for n in range(10) for _ in range(2)]


def test_threads_have_generations_of_their_own() -> None:
    spy, barrier = Spy(), threading.Barrier(3)
    model = Model(spy)
    threads = [
        threading.Thread(target=lambda: Pipeline(model)(3, each=lambda i: barrier.wait(10))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spy.generations() == 3
    for number in {seen[0] for seen in spy.seen}:
        mine = [seen[1:] for seen in spy.seen if seen[0] == number]
        assert mine == [(step, 3, branch) for step in range(3) for branch in range(2)]


def test_what_a_generation_keeps_goes_when_the_pipeline_returns_or_raises() -> None:
    spy = Spy()
    pipeline = Pipeline(Model(spy))
    pipeline(2)
    assert spy.last is not None
    gone = weakref.ref(spy.last)
    spy.last = None  # type: ignore[assignment]
    assert gone() is None
    with pytest.raises(RuntimeError):
        pipeline(2, each=lambda i: (_ for _ in ()).throw(RuntimeError))
    gone = weakref.ref(spy.last)
    spy.last = None  # type: ignore[assignment]
    assert gone() is None


# Loops that are not seen


def views(*values: float) -> Any:
    """Timesteps as `for t in timesteps` gives them."""
    return [t.expand(1) for t in torch.tensor(values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_taken_from_a_tensor_show_all(dtype: torch.dtype) -> None:
    """Also rounded ones, of which some are equal."""
    spy = Spy()
    timesteps = torch.tensor([1000.0, 999.0, 998.0, 500.0]).to(dtype)
    for _ in range(2):
        own_loop(Model(spy), [t.expand(1) for t in timesteps], 2)
        own_loop(Model(spy), [t.expand(1) for t in timesteps[2:]])
    assert [seen[1:3] for seen in spy.seen[:8]] == [(step, 4) for step in range(4) for _ in range(2)]
    assert [seen[1:3] for seen in spy.seen[8:10]] == [(0, 2), (1, 2)], "of the steps that run"
    assert spy.generations() == 4


def test_a_run_that_was_stopped_says_nothing_of_the_next() -> None:
    spy = Spy()
    model, timesteps = Model(spy), views(*range(30, 0, -1))
    own_loop(model, timesteps[:3])
    own_loop(model, timesteps)
    assert spy.steps() == [0, 1, 2, *range(30)]
    assert spy.seen[3][2] == 30


def test_timesteps_of_a_batch_in_training_are_no_schedule() -> None:
    spy = Spy()
    batch = torch.tensor([300.0, 900.0, 100.0, 500.0])
    own_loop(Model(spy), [batch[n : n + 1] for n in range(4)])
    assert all(num_steps is None for _, _, num_steps, _ in spy.seen)


@pytest.mark.parametrize(
    "values", [(900, 600, 300), (0.0, 0.3, 0.6), (1.0, 0.6, 0.2)], ids=["fall", "rise", "fractions"]
)
def test_values_show_steps_and_the_next_generation(values: tuple[float, ...]) -> None:
    spy = Spy()
    model = Model(spy)
    own_loop(model, values, 2)
    own_loop(model, values[:2], 2)  # stopped
    own_loop(model, values, 2)
    assert spy.steps() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2]
    assert spy.generations() == 3
    assert spy.last.warm_up(0.1, None) == generations.UNKNOWN_WARM_UP
    assert spy.last.warm_up(0.0, None) == 0
    assert spy.last.warm_up(7, None) == 7


def test_the_largest_of_many_timesteps_counts() -> None:
    spy = Spy()
    own_loop(
        Model(spy), [torch.tensor([[0.0, 9, 9]]), torch.tensor([[0.0, 9, 9]]), torch.tensor([[0.0, 5, 5]])]
    )
    assert spy.steps() == [0, 0, 1]


def test_the_same_inputs_again_and_again_are_a_benchmark() -> None:
    spy = Spy()
    model = Model(spy)
    for _ in range(6):
        model(X, torch.tensor([1.0]))
    assert [spy.last.is_timed, spy.last.warm_up(0.1, None)] == [True, 0]
    assert spy.steps() == [0, 0, 0, 1, 2, 3], "two calls of the warm-up, then a step each"
    own_loop(model, (900, 600), 2)
    assert not spy.last.is_timed
    assert spy.steps()[6:] == [0, 0, 1, 1]


def test_other_inputs_at_one_timestep_are_windows_or_a_model_of_one_step() -> None:
    spy = Spy()
    model = Model(spy)
    for n in range(own_loops.MANY_CALLS + 2):
        assert n == 0 or n > own_loops.MANY_CALLS or not spy.last.is_timed
        model(X + n, torch.tensor([1.0]))
    assert spy.last.is_timed


def test_without_a_timestep_each_call_is_a_step() -> None:
    class Plain(Model):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, None)

    spy = Spy()
    model = Plain(spy)
    for n in range(3):
        model(X + n)
    assert spy.steps() == [0, 1, 2]


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "sigma", "time"])
def test_usual_names_of_timesteps(name: str) -> None:
    spy = Spy()
    scope: dict[str, Any] = {"Model": Model}
    exec(
        "class Named(Model):\n"
        f"    def forward(self, x, {name}, context=None):\n"
        f"        return super().forward(x, {name})",
        scope,
    )
    own_loop(scope["Named"](spy), (900, 600), 2)
    assert spy.steps() == [0, 0, 1, 1]


def test_a_function_without_modules_has_a_clock_too() -> None:
    spy = Spy()
    for _ in range(3):
        spy(X)
    assert spy.steps() == [0, 1, 2]


# generation()


def test_a_told_generation_counts_calls() -> None:
    spy = Spy()
    model = Model(spy, spy)
    with svg_ear_compile.generation(num_steps=2, branches=2):
        for n in range(4):
            model(X + n, None)
    assert [seen[1:] for seen in spy.seen] == [
        (s, 2, b) for s in range(2) for b in range(2) for _ in range(2)
    ]


def test_it_may_run_in_another_thread() -> None:
    spy = Spy()
    model = Model(spy)
    with svg_ear_compile.generation(num_steps=3, branches=1):
        thread = threading.Thread(target=own_loop, args=(model, (900, 600, 300)))
        thread.start()
        thread.join()

    async def serve() -> None:
        with svg_ear_compile.generation(num_steps=3, branches=1):
            await asyncio.to_thread(own_loop, model, (900, 600, 300))

    asyncio.run(serve())
    assert [seen[1:3] for seen in spy.seen] == [(step, 3) for _ in range(2) for step in range(3)]


def test_of_two_that_are_open_a_foreign_thread_takes_none() -> None:
    spy = Spy()
    with svg_ear_compile.generation(num_steps=3), svg_ear_compile.generation(num_steps=4):
        thread = threading.Thread(target=own_loop, args=(Model(spy), (900, 600)))
        thread.start()
        thread.join()
    assert {num_steps for _, _, num_steps, _ in spy.seen} == {None}


def test_numbers_below_1_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="num_steps = 0: must be at least 1"),
        svg_ear_compile.generation(num_steps=0),
    ):
        pass


def test_looking_is_cheap() -> None:
    best = [1.0]

    def graph(x: Tensor, *_: Any) -> Tensor:
        for _ in range(300):
            begin = time.perf_counter()
            caller()
            best[0] = min(best[0], time.perf_counter() - begin)
        return x

    Pipeline(Model(graph))(1)
    assert best[0] < 20e-6


def test_the_words_of_the_report() -> None:
    run, _, _ = callable_of({"density": 0.3, "dense_steps": 0.1})
    model = Model(run)
    Pipeline(model)(30)
    assert run.record.steps == "3 dense first steps, of 30 (the pipeline)"
    own_loop(model, (900, 600))
    assert run.record.steps.startswith(
        "2 dense first steps; the number of steps is unknown outside of a pipeline"
    )
    model = Model(run)
    for _ in range(4):
        model(X, torch.tensor([5.0]))
    assert "taken for a benchmark" in run.record.steps
