"""What is kept while a sampling loop runs? One Generation per run, and in it the calls of each model.

A call of a model may be many calls of compiled graphs, one for each block. It begins when the loop's line or step
changes, or when a layer comes again. Calls made at one line of the loop, in one step, are numbered: line and number
tell the branches of guidance apart (even where guidance is switched off halfway), and so also context windows.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable
from typing import Any

from torch import nn

from .layers import Layer

UNKNOWN_WARM_UP = 2
"""Where the number of steps is unknown and dense_steps is a fraction, at most this many first steps are dense."""

_numbers = itertools.count(1)
_epoch = 0


def current_epoch() -> int:
    """A number that changes whenever all generations end."""
    return _epoch


def end_all() -> None:
    """Every generation that runs is over."""
    global _epoch
    _epoch += 1


class ModelCalls:
    """The calls of one model in one generation. branch: which guidance branch the running call is, from 0."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.branch = 0
        self.ends = False
        """Whether the running call is the last of its generation, judging by the step before."""
        self.read: dict[Hashable, Any] = {}
        """What the running call has read from its arguments (key_padding.py, packed.py)."""
        self._layers: dict[Hashable, Layer] = {}
        self._heard: set[Hashable] = set()
        self._branches: dict[Hashable, int] = {}
        self.step, self._line = -1, -1
        self._in_step: Counter[int] = Counter()
        self._calls_before = 0

    def is_running(self, graph: Hashable, step: int, line: int) -> bool:
        """Whether a call of this graph belongs to the call of the model that is already running."""
        return (step, line) == (self.step, self._line) and graph not in self._heard

    def hear(self, graph: Hashable, step: int, line: int, is_last_step: bool) -> bool:
        """A graph is called. Returns whether this begins a new call of the model."""
        begins = not self.is_running(graph, step, line)
        if begins:
            if step != self.step:
                self._calls_before = self._in_step.total()
                self._in_step.clear()
            self._heard.clear()
            self.read.clear()
            place = line, self._in_step[line]
            self.branch = self._branches.setdefault(place, len(self._branches))
            self.step, self._line = step, line
            self._in_step[line] += 1
            self.ends = is_last_step and self._in_step.total() >= self._calls_before
        self._heard.add(graph)
        return begins

    def layer(self, place: Hashable) -> Layer:
        """The layer at this place in the model. Layers are numbered in the order in which they first appear."""
        if place not in self._layers:
            self._layers[place] = Layer(len(self._layers))
        return self._layers[place]

    def release(self) -> None:
        """Frees the tensors that layers keep from one step to the next."""
        for layer in self._layers.values():
            layer.carried.clear()
        self.read.clear()


class Generation:
    """One run of a sampling loop: the step it is at, and what is kept for it.

    num_steps: None if unknown; source: where the number comes from, in words. memos: what other modules keep.
    """

    def __init__(self, num_steps: int | None, source: str) -> None:
        self.number, self.epoch = next(_numbers), _epoch
        self.num_steps, self.source = num_steps, source
        self.step = 0
        self.is_timed = False
        """Whether one step has had so many calls that this must be a benchmark, or a model of one step."""
        self.memos: dict[Hashable, Any] = {}
        self._models: dict[Hashable, ModelCalls] = {}

    @property
    def is_over(self) -> bool:
        """Whether `end_all` was called since it began."""
        return self.epoch != _epoch

    def move_to(self, step: int) -> None:
        """This step runs now. Models that the previous step did not call give up their tensors."""
        if step != self.step:
            self.release_all_but(self.step)
        self.step = step

    def release_all_but(self, step: int) -> None:
        """Frees the tensors of the models that this step did not call."""
        for calls in self._models.values():
            if calls.step != step:
                calls.release()

    def calls_of(self, model: nn.Module | None, graph: Hashable) -> ModelCalls:
        """The calls of a model; without a model, those of the graph itself."""
        key = (graph,) if model is None else id(model)
        if key not in self._models:
            self._models[key] = ModelCalls(len(self._models))
        return self._models[key]

    def warm_up(self, dense_steps: int | float, num_steps: int | None) -> int:
        """How many first steps run dense. A fraction is rounded to the nearest count: 0.1 of 30 is 3."""
        if self.is_timed:
            return 0
        if isinstance(dense_steps, int):
            return dense_steps
        if num_steps is None:
            return UNKNOWN_WARM_UP if dense_steps else 0
        return math.floor(dense_steps * num_steps + 0.5)
