"""What does a layer do in one call? Dense or sparse, how dense, in which variants, and whether its error is measured.

There is one Controller per generation and settings. The ops measure (kernels/measuring/errors.py), and the sums travel
to the host while the GPU goes on. A decision at step s uses the sums of steps up to s - LAG, and waits for them. So it
depends neither on the speed of anything nor on what ran before the generation.

- In the last dense steps (or in the first sparse one, if there are none), each layer tries which variant of each head
  has the smallest error (head_variants.py). It does so in the first guidance branch; the choice holds for all branches
  and steps. Trials are spread over steps, so that no step takes much longer than the others. With a target, dense steps
  try two densities, which give the first density (steering.py).
- After that each step measures a few layers in turn, and the density of the generation follows.
- The guard: a layer whose error is far above the target gets a higher density of its own and is measured again. If
  that does not help, it runs dense for the rest of the generation.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..kernels.context import Measure, SiteDecision
from ..settings import Settings
from .head_variants import ORDERS, RESPLIT
from .layers import MAX_FAILURES, Layer
from .readback import Error, Sums, error_of
from .steering import Sample, Steering

LAG = 1
TRIAL = (0.15, 0.45)
"""The two densities that are tried in a dense step."""
STEPS_A_SPREAD, MOST_SPREAD = 8, 4
"""Trials take one step per STEPS_A_SPREAD steps of the generation, at most MOST_SPREAD steps, and only dense ones: the
error of a sparse step before the choice is two to three times as large, at the time that decides a clip's layout."""
FEW_STEPS, OFTEN = 16, 2
"""In generations of up to FEW_STEPS steps, every OFTEN-th call of a layer is measured."""
BOOST = 1.5
"""A layer beyond the guard first gets this many times the density, and then runs dense."""
RETRY = 8
"""If sparsity does not pay, a layer tries again after this many steps."""


@dataclass(frozen=True, slots=True)
class Decision(SiteDecision):
    """What a layer does in one call.

    counter: why it is dense, in the words of the report's counts. anew: whether carried orders are to be made again.
    """

    counter: str = ""
    anew: bool = False


@dataclass(eq=False)
class CallLog:
    """What one attention site did in one call.

    sums: what it measured; audited: the same over all rows. end: when the host had issued it, in seconds.
    """

    site: int
    model: int
    layer: int
    branch: int
    step: int
    decision: Decision
    sums: Sums | None = None
    audited: Sums | None = None
    end: float = field(default_factory=time.perf_counter)

    def error(self) -> Error | None:
        """The error of the output, if it was measured; None for the trials of a dense call. Waits for the device."""
        return None if self.sums is None or self.decision.dense else error_of(*self.sums.read()[0])

    def true_error(self) -> Error | None:
        """The same over all rows, with the setting `audit`."""
        return None if self.audited is None else self.audited.errors()[0]


class Controller:
    """The decisions of one generation. can_split: whether heads may use splits, since the frame grid is known."""

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
        """By (model, layer): the step in which the layer last ran."""

    def begin(self, step: int, dense_steps: int, num_steps: int | None) -> None:
        """A call at this step follows. Of num_steps steps (None: unknown), the first `dense_steps` are dense."""
        self._dense_steps, self._num_steps = dense_steps, num_steps
        if step == self._step:
            return
        self._step = step
        self._read(step - LAG)
        if self.steering is not None and step >= dense_steps:
            self.steering.next(None if num_steps is None else max(num_steps - step, 1), self._ran_sparse)
            self._ran_sparse = self.steering.pays

    def decide(self, layer: Layer, branch: int, frozen: bool = False) -> Decision:
        """What to do in one call of a layer. frozen: nothing can be read or measured now."""
        s, step = self.settings, self._step
        if step < self._dense_steps:
            text = f"step {step + 1} of {self._dense_steps} dense warm-up steps"
            decision = Decision(text, counter="warm-up steps")
            return decision if s.is_dense_layer(layer.number) else self._try(decision, layer, branch, frozen)
        if s.is_dense_layer(layer.number):
            return Decision(f"layer {layer.number} is dense", counter="dense layers")
        if layer.failures >= MAX_FAILURES:
            return Decision(f"it failed {layer.failures} times in a row", counter="failed too often")
        if layer.guarded is not None:
            text = f"its error was {layer.guarded:.3g}, more than {s.guard:.3g}"
            return Decision(text, counter="error beyond max_error")
        if self.steering is not None and not self.steering.pays:
            text = f"an error of {s.target_error:g} needs more than max_density"
            decision = Decision(text, counter="sparsity would not pay")
            tries = not frozen and branch == 0 and (step + layer.number) % RETRY == 0
            measure = self._measure(layer, branch, self._trial_densities())
            return replace(decision, measure=measure) if tries else decision
        density = s.density if self.steering is None else self.steering.density
        if density is not None and layer.boost != 1:
            density = min(density * layer.boost, s.max_density)
        variants, count = layer.variants, layer.sparse_calls.get(branch, 0)
        layer.sparse_calls[branch] = count + 1
        decision = Decision(
            density=density,
            measure=self._measure(layer, branch)
            if not frozen and self._is_due(layer, branch, count)
            else None,
            split_heads=variants.split_heads,
            first_order=variants.first_order if s.first_order else (),
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
        """The decision, with a trial of variants added if it is the layer's turn."""
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
        measure = self._measure(layer, branch, densities, self._orders, s.first_order)
        return replace(decision, measure=measure)

    def _measure(self, layer: Layer, branch: int, *tried: Any) -> Measure:
        """A measurement in this call; tried: what it tries."""
        seed = hash((self.settings.seed, layer.number, branch, self._step)) % 2**63
        return Measure(seed, *tried)

    def _trial_densities(self) -> tuple[float, float]:
        """Both are within max_density."""
        (low, high), most = TRIAL, self.settings.max_density
        return low * min(1.0, most / high), min(high, most)

    def _read(self, last: int) -> None:
        """Learns from what the calls up to this step measured."""
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
        """What a call shows of its layer's error; in a dense call, at two densities."""
        assert log.sums is not None
        sums, decision, key = log.sums.read(), log.decision, (log.model, log.layer)
        own = 0 if decision.dense else 1
        tried = sums[own:]
        measure = decision.measure
        assert measure is not None
        if len(tried) and (measure.orders or measure.first_order):
            tried = layer.variants.choose(tried, len(measure.orders), measure.first_order)
        if decision.dense:
            return [
                Sample(key, density, _clamped(error_of(*x).call))
                for density, x in zip(measure.densities, tried, strict=True)
            ]
        error = _clamped(error_of(*sums[0]).call)
        self._guard(layer, error)
        if decision.density is None or layer.boost != 1:
            return []
        return [Sample(key, decision.density, error)]

    def _guard(self, layer: Layer, error: float) -> None:
        """Gives the layer more density, or makes it dense, if its error is too large."""
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
    """At least 1e-9, since an error of 0 has no logarithm. NaN stays NaN."""
    return max(error, 1e-9) if error == error else math.nan


def logged(sums: Tensor | None) -> Sums | None:
    return None if sums is None else Sums(sums)
