"""At which step is a sampling loop that is not a pipeline's? Read off the timesteps that the model is called with.

What applies, the first that does:

1. `generation(branches=...)`: every `branches` calls of a model are one step
2. the timestep is a view of the tensor that the loop runs over: its place in that tensor is the step. Timesteps that
   are all the same, computed ones, and plain numbers do not show that.
3. the timestep's value: a new value is a new step; one that goes against the direction, or is the first one again,
   begins another generation. The number of steps stays unknown, since what ran before says nothing about it.
4. no timestep at all: each call is a step
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.capture import is_recorded
from .caller import Caller, timestep
from .generations import Generation

SAME_CALLS, MANY_CALLS = 2, 32
"""A model that is called at one timestep again and again is being timed, or needs only one step. After this many
calls with the same inputs, or with any inputs, the warm-up is over."""
SAMPLE = 64
"""This many numbers, evenly spread, tell one input from another."""


class Clock:
    """The clock of one model in one thread, or of everything inside one `generation()`."""

    def __init__(self, num_steps: int | None = None, branches: int | None = None) -> None:
        self._announced, self._branches = num_steps, branches
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
        if self._announced is not None:
            return Generation(self._announced, "generation(num_steps=...)")
        return Generation(num_steps, source or "unknown")

    def advance(self, caller: Caller, limit: int | None = None) -> Generation:
        """A model is called: returns its generation, moved to the current step.

        limit: the setting num_steps, which ends a generation where nothing else does.
        """
        if self._branches is not None:
            self._advance_to(self._calls // self._branches)
            # None is no step: a number that was not announced is never reached.
            if self._step == self._announced:
                self._restart(self._new(None))
                self._calls = 0
                self._advance_to(0)
        else:
            self._by_timestep(timestep(caller), limit)
        self._calls += 1
        if self.generation.step == 0 and not self.generation.is_timed and self._is_timed(caller):
            self.generation.is_timed = True
            x = timestep(caller)
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
        """Whether the calls of the first step show that there will be no second step."""
        inputs = _fingerprint(caller)
        same = 0 if inputs is None else self._inputs.count(inputs)
        self._inputs.append(inputs)
        return same >= SAME_CALLS or len(self._inputs) > MANY_CALLS


def _fingerprint(caller: Caller) -> str | None:
    """A few numbers of each tensor that a model is called with. Waits for the device."""
    args, kwargs = caller.arguments
    tensors = [x.detach().reshape(-1) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors or any(is_recorded(x) for x in tensors):
        return None
    return str([x[:: max(1, x.numel() // SAMPLE)].tolist() for x in tensors])


def _view(x: Any) -> tuple[int, int, int] | None:
    """(address, size, place) of the tensor that one number was taken from, as `for t in timesteps` does."""
    if not isinstance(x, Tensor) or type(x) is not Tensor or x.numel() == 0 or any(x.stride()):
        return None
    storage = x.untyped_storage()
    size = storage.nbytes() // x.element_size()
    return (storage.data_ptr(), size, int(x.storage_offset())) if size > 1 else None


def _is_schedule(x: Tensor) -> bool:
    """Whether the numbers that x was taken from rise or fall all the way, unlike those of a training batch.

    Waits for the device.
    """
    if is_recorded(x):
        return False
    numbers = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).tolist()
    return numbers in (sorted(numbers), sorted(numbers, reverse=True)) and numbers[0] != numbers[-1]


def _largest(x: Any) -> float | None:
    """The timestep of a call; the largest if each token has its own. None if it cannot be read."""
    if isinstance(x, Tensor):
        return None if is_recorded(x) or not x.numel() else float(x.max())
    return float(x) if isinstance(x, (int, float)) else None
