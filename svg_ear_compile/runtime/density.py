"""What does a layer do in one call: dense or sparse, how dense, in which forms, and is its error measured?

One Controller for a generation and its settings. The ops measure (kernels/measuring/errors.py); the sums travel to
the host while the GPU goes on. What is decided at step s reads those of step s - LAG and before, and waits for them: it
never depends on how fast anything was, nor on anything before the generation.

- In the last dense steps (without any, in the first sparse one) each layer tries in which form each head errs least
  (head_variants.py), in the first branch of guidance: the choice holds for all branches and steps. Trials are spread
  over steps, so that none of them takes much longer than the others. With a target, dense steps try two densities:
  that is where the density begins (steering.py).
- Then each call measures few layers in turn, and the generation's density follows.
- The guard: a layer that errs far beyond the target is measured again at a higher density of its own, and runs dense
  for the rest of the generation if that does not help.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..settings import Settings
from .head_variants import ORDERS, RESPLIT
from .layers import MAX_FAILURES, Layer
from .readback import Error, Sums, error_of
from .steering import Sample, Steering

LAG = 1
TRIAL = (0.15, 0.45)
"""Densities that are tried in a dense step."""
STEPS_A_SPREAD, MOST_SPREAD = 8, 4
"""Trials are spread over a step for so many steps of the generation, over no more than so many, and over dense ones
only: a sparse step without forms errs two to three times as much, at the time that decides a clip's layout."""
FEW_STEPS, OFTEN = 16, 2
"""Generations of up to so many steps are measured so often: every second call of a layer."""
BOOST = 1.5
"""A layer beyond the guard gets so many times the density, before it goes dense."""
RETRY = 8
"""Where sparsity does not pay, a layer tries again after so many steps."""


class Decision(NamedTuple):
    """What a layer does in one call.

    dense: why it is dense, "" if it is not; counter: that reason for the report. density: None where dense, or as
    routed. measure: None: nothing is measured; else the densities to try besides, (): none. orders, terms: in which
    forms they are tried (context.Measure). split_heads, first_order: as in context.RunContext. anew: whether orders
    that were kept are to be made again.
    """

    dense: str = ""
    counter: str = ""
    density: float | None = None
    measure: tuple[float, ...] | None = None
    orders: tuple[str, ...] = ()
    terms: bool = False
    split_heads: tuple[bool, ...] = ()
    first_order: tuple[bool, ...] = ()
    anew: bool = False


@dataclass(eq=False)
class CallLog:
    """What one attention site did in one call. sums: of what it measured; audited: of all rows."""

    site: int
    model: int
    layer: int
    branch: int
    step: int
    decision: Decision
    sums: Sums | None = None
    audited: Sums | None = None

    def error(self) -> Error | None:
        """Of the output, where it was measured; trials of a dense call are no such. Waits for the device."""
        return None if self.sums is None or self.decision.dense else error_of(*self.sums.read()[0])

    def true_error(self) -> Error | None:
        """The same over all rows, with the setting `audit`."""
        return None if self.audited is None else self.audited.errors()[0]


class Controller:
    """Of one generation. can_split: whether heads may go by splits, as the frame grid is known."""

    def __init__(self, settings: Settings, can_split: bool) -> None:
        self.settings = settings
        self._orders = ORDERS if settings.order == "auto" and can_split else ()
        target = settings.target_error
        self.steering = (
            None if target is None else Steering(target, settings.min_density, settings.max_density)
        )
        self._step = -1
        self._dense_steps = 0
        self._num_steps: int | None = None
        self._ran_sparse = False
        self._unread: deque[tuple[Layer, CallLog]] = deque()
        self._last_step: dict[tuple[int, int], int] = {}
        """Of each layer (model, layer): when it ran last."""

    def begin(self, step: int, dense_steps: int, num_steps: int | None) -> None:
        """A call of this step comes, of `dense_steps` dense ones and num_steps (None: unknown) in all."""
        self._dense_steps, self._num_steps = dense_steps, num_steps
        if step == self._step:
            return
        self._step = step
        self._read(step - LAG)
        if self.steering is not None and step >= dense_steps:
            self.steering.next(None if num_steps is None else max(num_steps - step, 1), self._ran_sparse)
            self._ran_sparse = self.steering.pays

    def decide(self, layer: Layer, branch: int, frozen: bool = False) -> Decision:
        """What to do in one call of a layer. frozen: nothing can be read or measured just now."""
        s, step = self.settings, self._step
        if step < self._dense_steps:
            decision = Decision(
                f"step {step + 1} of {self._dense_steps} dense warm-up steps", "warm-up steps"
            )
            return decision if s.is_dense_layer(layer.number) else self._try(decision, layer, branch, frozen)
        if s.is_dense_layer(layer.number):
            return Decision(f"layer {layer.number} is dense", "dense layers")
        if layer.failures >= MAX_FAILURES:
            return Decision(f"it failed {layer.failures} times in a row", "failed too often")
        if layer.guarded is not None:
            text = f"its error was {layer.guarded:.3g}, more than {s.guard:.3g}"
            return Decision(text, "error beyond max_error")
        if self.steering is not None and not self.steering.pays:
            text = f"an error of {s.target_error:g} needs more than max_density"
            decision = Decision(text, "sparsity would not pay")
            tries = not frozen and branch == 0 and (step + layer.number) % RETRY == 0
            return decision._replace(measure=self._trial_densities()) if tries else decision
        density = s.density if self.steering is None else self.steering.density
        if density is not None and layer.boost != 1:
            density = min(density * layer.boost, s.max_density)
        variants, count = layer.variants, layer.sparse_calls.get(branch, 0)
        layer.sparse_calls[branch] = count + 1
        decision = Decision(
            density=density,
            measure=() if not frozen and self._is_due(layer, branch, count) else None,
            split_heads=variants.split_heads,
            first_order=variants.first_order,
            anew=s.order != "kmeans" and count % RESPLIT == 0,
        )
        return self._try(decision, layer, branch, frozen)

    def ran(self, layer: Layer, log: CallLog) -> None:
        """A call is over."""
        self._last_step[log.model, log.layer] = log.step
        if log.sums is not None:
            self._unread.append((layer, log))

    def _is_due(self, layer: Layer, branch: int, count: int) -> bool:
        every = self.settings.measure_every
        if not every:
            return False
        if self._num_steps is not None and self._num_steps <= FEW_STEPS:
            every = min(every, OFTEN)
        nothing_known = count == 0 and self._step <= LAG and not self._dense_steps
        return nothing_known or layer.strikes == 1 or (count + layer.number + branch) % every == 0

    def _try(self, decision: Decision, layer: Layer, branch: int, frozen: bool) -> Decision:
        """The decision with a trial of forms, where it is the layer's turn."""
        s = self.settings
        spread = min(max((self._num_steps or 0) // STEPS_A_SPREAD, 1), MOST_SPREAD, max(self._dense_steps, 1))
        turn = max(self._dense_steps - spread, 0) + layer.number % spread
        if frozen or branch or layer.variants.is_tried or not s.measure_every or self._step < turn:
            return decision
        forms = bool(self._orders or s.first_order)
        densities: tuple[float, ...]
        if decision.dense and s.target_error is not None:
            densities = self._trial_densities()
        elif forms and (s.density or decision.density) is not None:
            densities = (decision.density or s.density or 0.0,)
        else:
            return decision
        layer.variants.is_tried = True
        return decision._replace(measure=densities, orders=self._orders, terms=s.first_order)

    def _trial_densities(self) -> tuple[float, float]:
        """Never more than what a layer may use."""
        (low, high), most = TRIAL, self.settings.max_density
        return low * min(1.0, most / high), min(high, most)

    def _read(self, last: int) -> None:
        """Learns from what calls up to a step measured."""
        low: list[Sample] = []
        high: list[Sample] = []
        measured: list[Sample] = []
        while self._unread and self._unread[0][1].step <= last:
            layer, log = self._unread.popleft()
            samples = self._samples(layer, log)
            if any(math.isnan(sample.error) for sample in samples):
                continue
            if len(samples) == 2:
                low.append(samples[0])
                high.append(samples[1])
            else:
                measured += samples
        if self.steering is None:
            return
        if low and self._step <= self._dense_steps:
            self.steering.tried(low, high)
        elif high:
            self.steering.measured(high)
        self.steering.measured(measured)
        gone = [key for key, step in self._last_step.items() if step < last]
        self.steering.forget(set(gone))

    def _samples(self, layer: Layer, log: CallLog) -> list[Sample]:
        """What a call says of its layer's error: in a dense one, at two densities."""
        assert log.sums is not None
        sums, decision, key = log.sums.read(), log.decision, (log.model, log.layer)
        own = 0 if decision.dense else 1
        tried = sums[own:]
        if len(tried) and (decision.orders or decision.terms):
            tried = layer.variants.choose(tried, len(decision.orders), decision.terms)
        if decision.dense:
            densities = decision.measure or ()
            return [
                Sample(key, density, _clamped(error_of(*x).call))
                for density, x in zip(densities, tried, strict=True)
            ]
        error = _clamped(error_of(*sums[0]).call)
        self._guard(layer, decision, error)
        if decision.density is None or layer.boost != 1:
            return []
        return [Sample(key, decision.density, error)]

    def _guard(self, layer: Layer, decision: Decision, error: float) -> None:
        """Whether the layer errs so much that it gets more density, or goes dense."""
        if math.isnan(error):
            return
        if error <= self.settings.guard:
            layer.strikes = 0
            return
        layer.strikes += 1
        if self.steering is None or layer.strikes > 1:
            layer.guarded = error
        else:
            layer.boost *= BOOST


def _clamped(error: float) -> float:
    """Errors of exactly 0 have no logarithm."""
    return max(error, 1e-9) if error == error else math.nan


def logged(sums: Tensor | None) -> Sums | None:
    return None if sums is None else Sums(sums)
