"""At which step of which generation is this call, and in which call of its model? Exact inside a pipeline.

A generation is one run of a sampling loop. It is found in the first of these ways that applies:

1. the loop of a pipeline on the call stack (caller.py) shows the step, the number of steps and the generation
2. `with generation(num_steps=30, branches=2)` says so
3. the timesteps that the model is called with (own_loops.py)

In 2 and 3 each thread has its own clock for each model. What a generation keeps (generations.py) is freed when it
ends: when the pipeline returns, when `generation()` exits, or when the next generation begins. Large tensors are freed
after its last step.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from . import generations
from .caller import Caller
from .generations import Generation, ModelCalls
from .own_loops import Clock


class _Announced:
    """One `with generation(...)`. It belongs to the first thread that calls a model in it."""

    def __init__(self, num_steps: int | None, branches: int | None) -> None:
        self.clock = Clock(num_steps, branches)
        self.num_steps = num_steps
        self.thread: int | None = None


_lock = threading.Lock()
_open: list[_Announced] = []
_announced: ContextVar[_Announced | None] = ContextVar("svg_ear_generation", default=None)
_thread = threading.local()


def _current_announced() -> _Announced | None:
    """The one of this context; else the only open one that no other thread has used."""
    announced = _announced.get()
    if announced is None and _open:
        me = threading.get_ident()
        with _lock:
            free = [one for one in _open if one.thread in (None, me)]
            announced = free[0] if len(free) == 1 else None
    if announced is not None and announced.thread is None:
        announced.thread = threading.get_ident()
    return announced


def _own_clock(model: nn.Module | None, graph: Hashable) -> Clock:
    epoch = generations.current_epoch()
    if getattr(_thread, "epoch", None) != epoch:
        _thread.epoch, _thread.clocks, _thread.graphs = epoch, WeakKeyDictionary(), {}
    clocks: Any = _thread.graphs if model is None else _thread.clocks
    key = graph if model is None else model
    if key not in clocks:
        clocks[key] = Clock()
    clock: Clock = clocks[key]
    return clock


def tick(caller: Caller, graph: Hashable, limit: int | None = None) -> tuple[Generation, ModelCalls]:
    """A graph is called: in which generation (at `generation.step`), and in which call of which model.

    graph: a key that stays the same when the graph is compiled again. limit: the setting num_steps.
    """
    loop, line = caller.loop, -1
    name = (id(caller.layer), graph)
    if loop is not None:
        generation = _of_loop(caller, loop.memory)
        generation.move_to(loop.step)
        line = loop.line
    else:
        announced = _current_announced()
        clock = announced.clock if announced is not None else _own_clock(caller.model, graph)
        generation = clock.generation
        calls = generation.calls_of(caller.model, graph)
        if generation.is_over or not calls.is_running(name, generation.step, line):
            generation = clock.advance(caller, limit)
    calls = generation.calls_of(caller.model, graph)
    is_last = generation.num_steps is not None and generation.step == generation.num_steps - 1
    calls.hear(name, generation.step, line, is_last)
    if calls.ends:
        generation.release_all_but(generation.step)
    return generation, calls


def _of_loop(caller: Caller, memory: dict[str, Any]) -> Generation:
    """The generation of a pipeline's loop. One call of a pipeline may run several loops: a step that goes back, or
    other timesteps, show that."""
    loop = caller.loop
    assert loop is not None
    generation: Generation | None = memory.get("generation")
    if (
        generation is None
        or generation.is_over
        or memory["schedule"] is not loop.schedule
        or loop.step < memory["step"]
    ):
        announced = _announced.get()
        num_steps, source = loop.num_steps, "the pipeline"
        if announced is not None and announced.num_steps is not None:
            num_steps, source = announced.num_steps, "generation(num_steps=...)"
        generation = memory["generation"] = Generation(num_steps, source)
        memory["schedule"] = loop.schedule
    memory["step"] = loop.step
    return generation


@contextmanager
def generation(num_steps: int | None = None, branches: int | None = None) -> Iterator[None]:
    """Says how many steps your own sampling loop has, and how often it calls the model in each step.

    A diffusers pipeline does not need it. The model may be called in another thread, as with asyncio.to_thread.
    Raises ValueError for numbers below 1.

        with svg_ear_compile.generation(num_steps=30, branches=2):
            sample(model, prompt)
    """
    for name, value in (("num_steps", num_steps), ("branches", branches)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    announced = _Announced(num_steps, branches)
    token = _announced.set(announced)
    with _lock:
        _open.append(announced)
    try:
        yield
    finally:
        with _lock:
            _open.remove(announced)
        _announced.reset(token)
