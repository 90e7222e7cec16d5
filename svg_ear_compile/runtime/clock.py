"""At which step of which generation is this call, and in which call of its model? Exact where a pipeline calls.

A generation is one run of a sampling loop. Where it comes from, the first that applies:

1. the loop of a pipeline on the call stack (caller.py): step, number of steps and generation are read off it
2. `with generation(num_steps=30, branches=2)`: every `branches` calls of a model are a step
3. the timestep that the model is called with, where it is a view of the tensor that the loop runs over: its place in
   that tensor is the step. Timesteps that are all the same, or no tensor at all, or computed, do not show that.
4. that timestep's value: another one is another step, and one against the direction, or the first one again, begins
   another generation. The number of steps is unknown, and so it stays: what ran before says nothing.
5. nothing: each call is a step

In 2 to 5 a thread has a clock of its own for each model. What a generation keeps is freed when it ends: when the
pipeline returns, `generation()` exits, or the next one begins; large tensors when its last step is over.

A call of a model may be many calls of compiled graphs, one for each block. It begins when the loop's line or step
is another one, or when a layer comes again. Calls at one line of the loop, in one step, are numbered: line and number
tell the branches of guidance apart (also where guidance is switched off in mid-run), and context windows.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .caller import Caller, timestep
from .layers import Layer

UNKNOWN_WARM_UP = 2
"""So many first steps at most are dense where the number of steps is unknown and dense_steps is a fraction."""
SAME_CALLS, MANY_CALLS = 2, 32
"""A model that is called at one timestep again and again is being timed, or needs one step: after so many calls with
the same inputs, or with any, the warm-up is over."""
SAMPLE = 64
"""So many numbers, evenly spread, tell one input from another."""

_numbers = itertools.count(1)
_epoch = 0


class ModelCalls:
    """The calls of one model in one generation. branch: of the running call, a number from 0."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.branch = 0
        self.ends = False
        """Whether the running call is the last one of its generation, as far as the step before shows."""
        self.seen_keys: dict[Hashable, Any] = {}
        """What the running call has read of masks (key_padding.py)."""
        self._layers: dict[Hashable, Layer] = {}
        self._heard: set[Hashable] = set()
        self._branches: dict[Hashable, int] = {}
        self.step, self._line = -1, -1
        self._in_step: Counter[int] = Counter()
        self._calls_before = 0

    def is_running(self, graph: Hashable, step: int, line: int) -> bool:
        """Whether a call of this graph belongs to the call of the model that runs already."""
        return (step, line) == (self.step, self._line) and graph not in self._heard

    def hear(self, graph: Hashable, step: int, line: int, is_last_step: bool) -> bool:
        """A graph is called. Returns whether a call of the model begins with it."""
        begins = not self.is_running(graph, step, line)
        if begins:
            if step != self.step:
                self._calls_before = self._in_step.total()
                self._in_step.clear()
            self._heard.clear()
            self.seen_keys.clear()
            place = line, self._in_step[line]
            self.branch = self._branches.setdefault(place, len(self._branches))
            self.step, self._line = step, line
            self._in_step[line] += 1
            self.ends = is_last_step and self._in_step.total() >= self._calls_before
        self._heard.add(graph)
        return begins

    def layer(self, place: Hashable) -> Layer:
        """The layer at a place of the model: numbered as layers first appear in a generation."""
        if place not in self._layers:
            self._layers[place] = Layer(len(self._layers))
        return self._layers[place]

    def release(self) -> None:
        """Frees the tensors that layers keep from step to step."""
        for layer in self._layers.values():
            layer.carried.clear()
        self.seen_keys.clear()


class Generation:
    """One run of a sampling loop: where it stands, and what is kept for it.

    num_steps: None where it is unknown; source: where that is from, in words. memos: whatever others keep.
    """

    def __init__(self, num_steps: int | None, source: str) -> None:
        self.number, self.epoch = next(_numbers), _epoch
        self.num_steps, self.source = num_steps, source
        self.step = 0
        self.is_timed = False
        """Whether one step has had so many calls that this is no generation but a benchmark, or a one-step model."""
        self.memos: dict[Hashable, Any] = {}
        self._models: dict[Hashable, ModelCalls] = {}

    def move_to(self, step: int) -> None:
        """This step runs. Models that the one before did not call hold no tensors any more."""
        if step != self.step:
            self.release_all_but(self.step)
        self.step = step

    def release_all_but(self, step: int) -> None:
        """Frees the tensors of models that this step did not call."""
        for calls in self._models.values():
            if calls.step != step:
                calls.release()

    def calls_of(self, model: nn.Module | None, graph: Hashable) -> ModelCalls:
        """Those of a model; without one a graph is its own."""
        key = (graph,) if model is None else id(model)
        if key not in self._models:
            self._models[key] = ModelCalls(len(self._models))
        return self._models[key]

    def warm_up(self, dense_steps: int | float, num_steps: int | None) -> int:
        """How many first steps run dense: a count as it is, a fraction to the nearest: 0.1 of 30 is 3."""
        if self.is_timed:
            return 0
        if isinstance(dense_steps, int):
            return dense_steps
        if num_steps is None:
            return UNKNOWN_WARM_UP if dense_steps else 0
        return math.floor(dense_steps * num_steps + 0.5)


class Clock:
    """Of one model in one thread, or of what stands in one `generation()`: sampling loops that are not seen."""

    def __init__(self, num_steps: int | None = None, branches: int | None = None) -> None:
        self._told, self._branches = num_steps, branches
        self.generation = self._new(num_steps)
        self._calls = 0
        self._step = -1
        self._schedule: tuple[int, int] | None = None
        self._origin = 0
        self._first: float | None = None
        self._last: float | None = None
        self._direction = 0.0
        self._inputs: list[str | None] = []
        self._timed_at: Any = None

    def _new(self, num_steps: int | None, source: str = "") -> Generation:
        if self._told is not None:
            return Generation(self._told, "generation(num_steps=...)")
        return Generation(num_steps, source or "unknown")

    def advance(self, caller: Caller, limit: int | None = None) -> Generation:
        """A model is called: which generation that is. Its `step` is where it stands. limit: the setting num_steps,
        which ends a generation where nothing else does."""
        if self._branches is not None:
            self._advance_to(self._calls // self._branches)
            if self._told is not None and self._step == self._told:  # called more often than was said
                self._restart(self._new(None))
                self._calls = 0
                self._advance_to(0)
        else:
            self._by_timestep(timestep(caller.model, caller.arguments), limit)
        self._calls += 1
        if self.generation.step == 0 and not self.generation.is_timed and self._is_timed(caller):
            self.generation.is_timed = True
            x = timestep(caller.model, caller.arguments)
            self._timed_at = _view(x) or _largest(x)
        return self.generation

    def _by_timestep(self, x: Any, limit: int | None) -> None:
        view = _view(x)
        if self.generation.is_timed and (view or _largest(x)) == self._timed_at:
            self._advance_to(self._step + 1)
            return
        if view is not None:
            schedule, place = view[:2], view[2]
            again = schedule != self._schedule or place < self._origin + self._step
            if again and _is_schedule(x):
                self._restart(self._new(view[1] - place, "the tensor of timesteps"))
                self._schedule, self._origin = schedule, place
            if schedule == self._schedule:
                self._advance_to(place - self._origin)
                return
        moment = _largest(x)
        if self._begins(moment) or (moment is None and self._step + 1 == limit):
            self._restart(self._new(None))
        if self._step < 0 or moment is None or moment != self._last:
            if moment is not None and self._last is not None:
                self._direction = self._direction or moment - self._last
            self._advance_to(self._step + 1)
            self._first = moment if self._step == 0 else self._first
        self._last = moment

    def _begins(self, moment: float | None) -> bool:
        if self._schedule is not None or self.generation.is_timed:
            return True
        if self._step < 0 or moment is None or self._last is None or moment == self._last:
            return False
        return moment == self._first or (moment - self._last) * self._direction < 0

    def _restart(self, generation: Generation) -> None:
        self.generation = generation
        self._step, self._schedule, self._origin = -1, None, 0
        self._first = self._last = None
        self._direction = 0.0
        self._inputs.clear()

    def _advance_to(self, step: int) -> None:
        if step != self._step:
            self._inputs.clear()
        self._step = step
        self.generation.move_to(step)

    def _is_timed(self, caller: Caller) -> bool:
        """Whether the calls of the first step show that no second one comes."""
        inputs = _fingerprint(caller)
        same = 0 if inputs is None else self._inputs.count(inputs)
        self._inputs.append(inputs)
        return same >= SAME_CALLS or len(self._inputs) > MANY_CALLS


def _fingerprint(caller: Caller) -> str | None:
    """A few numbers of each tensor that a model is called with; reads them from the device."""
    args, kwargs = caller.arguments
    tensors = [x.detach().reshape(-1) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors or any(_is_recorded(x) for x in tensors):
        return None
    return str([x[:: max(1, x.numel() // SAMPLE)].tolist() for x in tensors])


def _view(x: Any) -> tuple[int, int, int] | None:
    """(address, size, place) of the tensor that one number was taken from, as by `for t in timesteps`."""
    if not isinstance(x, Tensor) or type(x) is not Tensor or x.numel() == 0 or any(x.stride()):
        return None
    storage = x.untyped_storage()
    size = storage.nbytes() // x.element_size()
    return (storage.data_ptr(), size, x.storage_offset()) if size > 1 else None


def _is_schedule(x: Tensor) -> bool:
    """Whether the numbers that x was taken from rise or fall all the way: those of a batch in training do not.
    Reads them from the device."""
    if _is_recorded(x):
        return False
    numbers = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).tolist()
    return numbers in (sorted(numbers), sorted(numbers, reverse=True)) and numbers[0] != numbers[-1]


def _largest(x: Any) -> float | None:
    """The timestep of a call: the largest, where each token has its own. None where it cannot be read."""
    if isinstance(x, Tensor):
        return None if _is_recorded(x) or not x.numel() else float(x.max())
    return float(x) if isinstance(x, (int, float)) else None


def _is_recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: then nothing can be read from the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Told:
    """One `with generation(...)`. It is for the thread that calls a model in it first."""

    def __init__(self, num_steps: int | None, branches: int | None) -> None:
        self.clock = Clock(num_steps, branches)
        self.num_steps = num_steps
        self.thread: int | None = None


_lock = threading.Lock()
_open: list[_Told] = []
_told: ContextVar[_Told | None] = ContextVar("svg_ear_generation", default=None)
_thread = threading.local()


def _current_told() -> _Told | None:
    """That of this context; else the only one that is open and that no other thread has used."""
    told = _told.get()
    if told is None and _open:
        me = threading.get_ident()
        with _lock:
            free = [one for one in _open if one.thread in (None, me)]
            told = free[0] if len(free) == 1 else None
    if told is not None and told.thread is None:
        told.thread = threading.get_ident()
    return told


def _own_clock(model: nn.Module | None, graph: Hashable) -> Clock:
    if getattr(_thread, "epoch", None) != _epoch:
        _thread.epoch, _thread.clocks, _thread.graphs = _epoch, WeakKeyDictionary(), {}
    clocks: Any = _thread.graphs if model is None else _thread.clocks
    key = graph if model is None else model
    if key not in clocks:
        clocks[key] = Clock()
    clock: Clock = clocks[key]
    return clock


def tick(caller: Caller, graph: Hashable, limit: int | None = None) -> tuple[Generation, ModelCalls]:
    """A graph is called: in which generation, in which call of which model. Generation.step is where it stands.
    graph: what stays when a graph is compiled again. limit: the setting num_steps."""
    loop, line = caller.loop, -1
    name = (id(caller.layer), graph)
    if loop is not None:
        generation = _of_loop(caller, loop.memory)
        generation.move_to(loop.step)
        line = loop.line
    else:
        told = _current_told()
        clock = told.clock if told is not None else _own_clock(caller.model, graph)
        generation = clock.generation
        calls = generation.calls_of(caller.model, graph)
        if generation.epoch != _epoch or not calls.is_running(name, generation.step, line):
            generation = clock.advance(caller, limit)
    calls = generation.calls_of(caller.model, graph)
    is_last = generation.num_steps is not None and generation.step == generation.num_steps - 1
    calls.hear(name, generation.step, line, is_last)
    if calls.ends:
        generation.release_all_but(generation.step)
    return generation, calls


def _of_loop(caller: Caller, memory: dict[str, Any]) -> Generation:
    """That of a pipeline's loop. One call of a pipeline may run several: then the step goes back, or the timesteps
    are others."""
    loop = caller.loop
    assert loop is not None
    generation: Generation | None = memory.get("generation")
    if (
        generation is None
        or generation.epoch != _epoch
        or memory["schedule"] is not loop.schedule
        or loop.step < memory["step"]
    ):
        told = _told.get()
        num_steps, source = loop.num_steps, "the pipeline"
        if told is not None and told.num_steps is not None:
            num_steps, source = told.num_steps, "generation(num_steps=...)"
        generation = memory["generation"] = Generation(num_steps, source)
        memory["schedule"] = loop.schedule
    memory["step"] = loop.step
    return generation


def reset() -> None:
    """Every generation that runs is over."""
    global _epoch
    _epoch += 1


@contextmanager
def generation(num_steps: int | None = None, branches: int | None = None) -> Iterator[None]:
    """Around one run of a sampling loop of your own: how many steps it has, and how many calls of the model a step.

    A diffusers pipeline needs none of it. The call may run in another thread, as by asyncio.to_thread.
    Raises ValueError for numbers below 1.

        with svg_ear_compile.generation(num_steps=30, branches=2):
            sample(model, prompt)
    """
    for name, value in (("num_steps", num_steps), ("branches", branches)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    told = _Told(num_steps, branches)
    token = _told.set(told)
    with _lock:
        _open.append(told)
    try:
        yield
    finally:
        with _lock:
            _open.remove(told)
        _told.reset(token)
