"""At which step of which generation is this call? The step clock, from what the host sees of each call.

Nothing in a graph says how many steps a generation has, or that one begins. The clock sees successive calls
of models, each with a moment: the timestep (graphs of whole models), a fingerprint of the timestep embedding
(graphs of single blocks, which never see the timestep), or nothing.

- step: how many different successive moments this generation has had. One trajectory per thread, shared by
  all models: Wan2.2's second transformer, first called in mid-trajectory, takes no warm-up.
- branch: the ordinal of this model's calls at one moment (conditional, unconditional, ...).
- the number of steps, of which a fraction may be dense: as told or set, or that of the previous generation
  that began at the same moment. In a first generation the timesteps show it: of few steps the third, of many
  those of the middle (foreseen_steps).
- a new generation begins when timesteps go against their direction, when a moment is the first one again,
  when a model's shapes change, or, where moments have no direction, when num_steps is set and reached.
- without moments, each call is a step.
- `with generation(num_steps=30, branches=2)` says it all: it begins a generation, and with branches every
  `branches` successive calls are one step, whatever their moments.

Embeddings that hold pooled text as well (HunyuanVideo, Kandinsky) differ between the calls of one step: with
guidance in two calls, each call then counts as a step, unless generation(branches=2) says otherwise.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

DEFAULT_NUM_STEPS = 50
FEW_STEPS = 16
"""Up to so many steps are foreseen from the first timesteps of a generation."""
SEEN = 0.4
"""Of many steps: by then they are clear, and none of those that remain is for the warm-up."""
NEARLY_NOISE = 0.975
"""A tenth of the way of a schedule with flow shift 5; a fifth with shift 10."""
_REMEMBERED = 32
"""Of so many generations (by their first moment) the number of steps is remembered."""

_generations = itertools.count(1)


def _nothing() -> Any:
    """Stands for a weak reference to nothing."""


Moment = float | str | None


class Tick(NamedTuple):
    """Where one call of a model stands. generation is a number that no other one of the process has."""

    step: int
    branch: int
    generation: int


class Clock:
    """The trajectory of one thread."""

    def __init__(self) -> None:
        self.tick = Tick(0, 0, 0)
        self.model: Any = None
        """The model of the running call, and of each call of its parts until the next tick."""
        self.position = 0
        """How many attention sites of the running call have been seen."""
        self._counts: dict[Moment, int] = {}
        self._told: tuple[int | None, int | None] = (None, None)
        self._token = self._layer = _nothing
        self._forget()

    def _forget(self) -> None:
        self._first: Moment = None
        self._last: Moment = None
        self._direction = 0.0
        self._noise: list[float] = []
        """Of each step with a timestep: that over the first one, which is sigma."""
        self._step = -1
        self._calls = 0
        self._branches: dict[Hashable, int] = {}
        self._shapes: dict[Hashable, Hashable] = {}
        self._generation = next(_generations)

    def is_running(self, token: Any, layer: Any) -> bool:
        """Whether a block that gets these two objects belongs to the model call that runs already.

        token: what all blocks get, and lives no longer than the call: the timestep embedding. layer: what
        only this block has: a Parameter. The call is over when the token is another one, or when its first
        layer comes again.
        """
        if layer is not None and self._layer() is layer:
            return False
        return self._token() is token and (token is not None or self._layer() is not None)

    def advance(
        self,
        model: Hashable,
        moment: Moment,
        shape: Hashable,
        limit: int | None = None,
        token: Any = None,
        layer: Any = None,
    ) -> Tick:
        """A model is called. limit: num_steps, where the user set it. token and layer: see is_running."""
        self._token = _nothing if token is None else weakref.ref(token)
        self._layer = _nothing if layer is None else weakref.ref(layer)
        if self._begins(model, moment, shape, limit):
            self._remember()
            self._forget()
        self._shapes[model] = shape
        if self._is_next_step(moment):
            if isinstance(moment, float) and isinstance(self._last, float):
                self._direction = self._direction or moment - self._last
            self._step += 1
            self._first = moment if self._step == 0 else self._first
            if isinstance(moment, float) and isinstance(self._first, float) and self._first > 0:
                self._noise.append(moment / self._first)
            self._branches.clear()
        self._last = moment
        self._calls += 1
        branch = self._branches.get(model, 0)
        self._branches[model] = branch + 1
        self.tick, self.model, self.position = Tick(self._step, branch, self._generation), model, 0
        return self.tick

    def _is_next_step(self, moment: Moment) -> bool:
        branches = self._told[1]
        if branches is not None:
            return self._calls % branches == 0
        return self._step < 0 or moment is None or moment != self._last

    def _begins(self, model: Hashable, moment: Moment, shape: Hashable, limit: int | None) -> bool:
        if self._step < 0:
            return False
        if self._shapes.get(model, shape) != shape:
            return True
        num_steps, branches = self._told
        if branches is not None:
            return num_steps is not None and self._calls == num_steps * branches
        if not self._is_next_step(moment):
            return False
        if isinstance(moment, float):
            if moment == self._first:
                return True
            return isinstance(self._last, float) and (moment - self._last) * self._direction < 0
        reached = (num_steps or limit or math.inf) <= self._step + 1
        return reached or (moment is not None and moment == self._first)

    def _remember(self) -> None:
        """This generation's number of steps, for the next that begins at the same moment."""
        self._counts.pop(self._first, None)
        if self._first is not None:
            self._counts[self._first] = self._step + 1
        while len(self._counts) > _REMEMBERED:
            del self._counts[next(iter(self._counts))]

    def num_steps(self, setting: int | None) -> tuple[int, str]:
        """Steps of the running generation, and where that number is from, in words."""
        if self._told[0] is not None:
            return self._told[0], "generation(num_steps=...)"
        if setting is not None:
            return setting, "the setting num_steps"
        if self._first in self._counts:
            return self._counts[self._first], "the previous generation"
        foreseen = foreseen_steps(self._noise)
        if foreseen is not None:
            return foreseen, "the timesteps so far"
        return DEFAULT_NUM_STEPS, f"nothing: {DEFAULT_NUM_STEPS} is assumed"

    def begin(self, num_steps: int | None, branches: int | None) -> None:
        """A generation begins now; None leaves what it stands for to be found as otherwise."""
        if self._step >= 0:
            self._remember()
        self._forget()
        self._told = (num_steps, branches)

    @property
    def told_branches(self) -> bool:
        """Whether steps are counted by calls, so that moments need not be read."""
        return self._told[1] is not None


def dense_count(dense_steps: int | float, num_steps: int) -> int:
    """How many first steps run dense: a count as it is, a fraction to the nearest: 0.2 of 30 is 6."""
    return dense_steps if isinstance(dense_steps, int) else math.floor(dense_steps * num_steps + 0.5)


def foreseen_steps(noise: Sequence[float], rounding: float = 1e-3) -> int | None:
    """The number of steps of a generation, if its sigmas so far, from 1 downwards, show it.

    After k of n steps a schedule with flow shift s (1: linear) has sigma / (1 - sigma) = s (n - k) / k. From
    two such odds, after half the steps seen and after all of them, s and n follow. Timesteps may be rounded
    to whole ones, of a thousand: n is the largest that they allow, so a long generation is not taken for a
    short one. Where there is still nearly nothing but noise, nothing is foreseen: other schedules begin
    slowly. Nor are many steps before SEEN of them: what they would allow may be any number.
    """
    k = len(noise) - 1
    if k < 2 or noise[k] > NEARLY_NOISE:
        return None
    half = k // 2
    fallen, all_fallen = 1 - noise[half] + rounding, 1 - noise[k] - rounding
    if not 0 < fallen < all_fallen < 1:
        return None
    ratio = (1 / fallen - 1) / (1 / all_fallen - 1) * half / k  # (n - half) / (n - k)
    steps = (ratio * k - half) / (ratio - 1) if ratio > 1 else math.inf
    return max(round(steps), k + 1) if steps <= max(FEW_STEPS, k / SEEN) else None


_thread = threading.local()
_epoch = 0


def clock() -> Clock:
    """The clock of this thread."""
    if getattr(_thread, "epoch", None) != _epoch:
        _thread.clock, _thread.epoch = Clock(), _epoch
    current: Clock = _thread.clock
    return current


def reset() -> None:
    """Every thread starts with a new clock."""
    global _epoch
    _epoch += 1


@contextmanager
def generation(num_steps: int | None = None, branches: int | None = None) -> Iterator[None]:
    """Around one sampling run of a pipeline: how many steps it has, and how many model calls a step.

    with svg_ear_compile.generation(num_steps=30, branches=2):
        pipeline(prompt, num_inference_steps=30)
    """
    for name, value in (("num_steps", num_steps), ("branches", branches)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    clock().begin(num_steps, branches)
    try:
        yield
    finally:
        clock().begin(None, None)
