"""How dense does a layer run, so that its measured error meets the target? In which order are its tokens?
And when is it not worth it?

One Control per layer, guidance branch and generation: what it does depends on nothing before, so the same
generation gives the same bits. The ops measure (kernels/measure.py); the sums travel to the host while the
GPU goes on. The decision at step s reads those of step s - LAG and before, waited for by their event: it
never depends on how fast anything was.

- Two steps before the first sparse one, while the call is dense anyhow, the layer tries TRIAL densities on
  the sampled rows. From their errors follow the density to begin with, and how fast the error falls with it.
  Without such a step, or before it can be read, it begins with the cautious FIRST_DENSITY.
- It tries each density in up to four forms: in both ORDERS where the frame grid is known, and in each with
  and without first-order terms; each head goes by the form that forms.py chooses. Orders of splits are made
  in one sparse call of RESPLIT, and used again in the others: tokens hardly move against each other from step
  to step.
- In the middle of a generation it chooses again, at its density: attention of nearly clean video is another.
  What the trial before found counts as much: where most of a head's error lies in few rows, one may miss
  them.
- Then it measures the first sparse calls, every measure_every-th of the others, and what follows a change
  of density. The error is taken to fall as exp(-rate span(d)) with the density d (`span`): AIM of the target
  needs ln(error / (AIM target)) / rate more of that. One measurement may be far too low, where most of the
  error lies in few rows: it leads down by no more than LOWER. Differences within HYSTERESIS are left alone.
- In the last steps errors grow faster: the density has something to spare (LATE); where there is not so much,
  the layer is dense. Those of SMALL targets grow sooner: they are measured more often (OFTEN), and lead down
  less.
- Where steps are few (schedule.FEW_STEPS) errors change more from one to the next. As long as nothing can
  be read, a smaller target than FIRST_TARGET begins denser, or dense; more is to spare, and sooner.
- Where more than max_density is needed, sparsity would not pay: the layer goes dense, and tries again, as
  above, every so often.
- The guard: an error beyond max_error, at the density that was thought right, makes the layer dense for the
  rest of the generation. Where a target is set, the next call is measured too, at a higher density if there
  is one, and only a second such error counts; the layer never goes down again to the density that failed.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .forms import ORDERS, choose, heads_of, losses_of
from .schedule import DEFAULT_NUM_STEPS, FEW_STEPS
from .settings import Settings
from .sums import Error, Sums, error_of

LAG = 2
TRIAL = (0.15, 0.45)
MIDDLE = 0.4
"""Forms are chosen again in the first call behind this share of the steps that makes orders anew. Not of few
steps, which are over before it is worth it."""
RESPLIT = 8
FIRST_DENSITY = 0.4
FIRST_TARGET = 0.08
"""Errors at FIRST_DENSITY are up to 3 or 4 times FIRST_TARGET in first calls of the tiny HunyuanVideo, up to
1.5 times in the other two models."""
FIRST_CALLS = 3
"""So many sparse calls are measured whatever measure_every is: later ones differ less from those before."""
AIM = 0.9
"""Of the target: errors drift from step to step, and are noticed late."""
RETRY = 8
"""A layer that went dense tries again after so many steps."""
RATE, RATES = 5.0, (2.0, 12.0)
"""Assumed, and what a trial may find. The median error of the calls of three tiny models falls as
exp(-rate d) with rates of 4 to 7 between densities of 0.15 and 0.6 (docs/QUALITY.md)."""
POWER = 0.14
"""Densities below go by their logarithm: there errors fall like a power of them."""
LOWER, LOWER_LATE = 0.4, 0.15
"""What is needed falls by no more than as if the error's logarithm had, from one measurement to the next: the
second where errors are measured OFTEN, since they grow."""
HALF = 0.5
"""In one decision the density goes down to this share at most: below, the error may be any."""
SMALL, SMALLER = 0.04, 0.02
"""Targets below. Their errors grow sooner: of 30 steps, those of 5% of the layers 1.7 to 2 times in two steps
from the 25th on, if the target is 0.01."""
OFTEN = 2 / 3
"""Behind this share of the steps every LAG-th is measured: those whose errors the last two can go by."""
LATE, LATE_OF_SMALLER, LATE_OF_FEW = (0.87, 2.2), (0.8, 3.1), (0.5, 2.5)
"""Behind this share of the steps errors may become so many times as large, the more the nearer the end: that
much the density has to spare. Of 30 steps the errors of 95% of the layers grow less than 1.5 times in two
steps, of the last two steps up to 2.6 times; of 4 and 8 steps some grow 5 to 9 times in the last two, before
that mostly less than twice (three tiny models). There SMALL targets have more to spare, by the root of what
they are smaller."""
HYSTERESIS = 0.1
"""Smaller relative changes of density are not made; nor is a layer dense that needs so little more."""
NEWS = 0.3
"""A relative change of density of more than this is measured at once."""
_REMEMBERED = 256
"""Steps of a layer in the report."""


class Decision(NamedTuple):
    """What a layer does at one step.

    density: None where dense, or as routed. counter: for the report. split_heads, first_order: as in
    context.Call. anew: whether orders that were kept are to be made again. orders, terms: in which forms
    densities are tried, as in context.Measure.
    """

    dense: str | None = None
    counter: str = ""
    density: float | None = None
    measure: tuple[float, ...] | None = None
    """None: nothing is measured; else the densities to try, (): none."""
    orders: tuple[str, ...] = ()
    terms: bool = False
    split_heads: tuple[bool, ...] = ()
    first_order: tuple[bool, ...] = ()
    anew: bool = False


@dataclass
class Step:
    """What a layer did at one step, in a call of `graph`. sums: of what it measured; audited: of all rows."""

    step: int
    decision: Decision
    sums: Sums | None = None
    audited: Sums | None = None
    graph: int = 0

    def error(self) -> Error | None:
        """Of the output, where it was measured; trials of a dense call are no such. Waits for the device."""
        return None if self.sums is None or self.decision.dense else error_of(*self.sums.read()[0])

    def true_error(self) -> Error | None:
        """The same over all rows, with the setting `audit`."""
        return None if self.audited is None else self.audited.errors()[0]


def span(density: float) -> float:
    """What the logarithm of the error falls with: the density d; below POWER, POWER (1 + ln(d / POWER))."""
    return density if density >= POWER else POWER * (1 + math.log(density / POWER))


def density_of(span: float) -> float:
    """The inverse."""
    return span if span >= POWER else POWER * math.exp(span / POWER - 1)


@dataclass(eq=False)
class Control:
    """One layer in one branch of one generation. grid: whether its frame grid is known."""

    settings: Settings
    grid: bool = False
    density: float | None = field(init=False)
    rate: float = RATE
    pays: bool = True
    guarded: float | None = None
    """The error that made the guard run this layer dense for good."""
    strikes: int = 0
    least: float = 0.0
    """A density at which the error was beyond max_error is not used again."""
    split_heads: tuple[bool, ...] = ()
    """Which heads go by splits although the grid is known; (): none."""
    first_order: tuple[bool, ...] = ()
    """Which heads get first-order terms; (): none."""
    steered: bool = False
    """Whether the density, or that the layer is dense, follows from something measured."""
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _unread: deque[Step] = field(default_factory=deque)
    _last: Step | None = None
    """The last that measured."""
    _measured_at: float | None = None
    """The density that was thought right then; None: the call was dense."""
    _sparse_calls: int = 0
    _anew: bool = False
    """Whether other heads go by splits than those whose orders were kept."""
    _chosen_again: bool = False
    _losses: Tensor | None = None
    """What the forms of each head lose, as far as trials have shown."""
    _often: bool = False
    """Whether errors are measured OFTEN by now."""
    _needed: float = math.inf
    """The density that was last found to be needed; infinite: none was."""

    def __post_init__(self) -> None:
        s = self.settings
        self.density = s.density if s.target_error is None else min(FIRST_DENSITY, s.max_density)

    def warm_up(self, step: int, first: int, tries: bool = True) -> Decision:
        """What to do in a dense step, of `first` ones. tries: whether anything can be tried in it."""
        decision = Decision(f"step {step + 1} of {first} dense warm-up steps", "warm-up steps")
        return self._trial(decision) if tries and step == max(first - LAG, 0) else decision

    def decide(self, step: int, frozen: bool = False, num_steps: int = DEFAULT_NUM_STEPS) -> Decision:
        """What to do at a step behind the warm-up. frozen: nothing can be read or measured just now."""
        target = self.settings.target_error
        few = num_steps <= FEW_STEPS and target is not None
        self._often = target is not None and target < SMALL and step >= OFTEN * num_steps
        while not frozen and self._unread and self._unread[0].step <= step - LAG:
            self._learn(self._unread.popleft())
        if few and not self.steered:
            self._begin_denser()
        if self.guarded is not None:
            reason = f"its error was {self.guarded:.3g}, more than max_error {self.settings.guard:g}"
            return Decision(reason, "error beyond max_error")
        if not self.pays:
            retry = not frozen and (self._last is None or step - self._last.step >= RETRY)
            reason = f"an error of {self.settings.target_error:g} needs more than max_density"
            decision = Decision(reason, "sparsity would not pay")
            if not self.steered:
                decision = Decision("nothing that was measured can be read yet", "nothing measured yet")
            return self._trial(decision) if retry else decision
        density = self.density
        if target is not None and density is not None:
            start, growth = LATE_OF_FEW if few else LATE if target >= SMALLER else LATE_OF_SMALLER
            if few:
                growth *= math.sqrt(max(SMALL / target, 1.0))
            late = min(max((step / num_steps - start) / (1 - start), 0.0), 1.0)
            need = density_of(span(density) + late * math.log(growth) / self.rate)
            if need > self.settings.max_density * (1 + HYSTERESIS):
                reason = f"an error of {target:g} needs more than max_density at the end"
                return Decision(reason, "sparsity would not pay")
            density = min(need, self.settings.max_density)
        every = self.settings.measure_every
        due = bool(every) and not frozen and self._is_due(step, num_steps)
        orders_due = self._sparse_calls % RESPLIT == 0
        anew = self.settings.order != "kmeans" and (orders_due or self._anew)
        decision = Decision(
            density=density, measure=() if due else None, split_heads=self.split_heads,
            first_order=self.first_order, anew=anew,
        )  # fmt: skip
        self._sparse_calls += 1
        self._anew = False
        middle = num_steps > FEW_STEPS and step >= MIDDLE * num_steps
        if every and orders_due and middle and not frozen and not self._chosen_again:
            self._chosen_again = True
            decision = self._try_forms(decision)
        return decision

    def ran(
        self,
        step: int,
        decision: Decision,
        sums: Tensor | None = None,
        audited: Tensor | None = None,
        graph: int = 0,
    ) -> None:
        """The call of a step is over. sums: what it measured, audited: over all rows; on the device.
        graph: the number of the graph that was called; a layer may be in several, of other batch sizes."""
        measured, all_rows = (None if x is None else Sums(x) for x in (sums, audited))
        entry = Step(step, decision, measured, all_rows, graph)
        self.steps.append(entry)
        if sums is not None:
            self._unread.append(entry)
            self._last = entry
            self._measured_at = None if decision.dense else self.density

    def _begin_denser(self) -> None:
        """FIRST_DENSITY for FIRST_TARGET, smaller targets need more; dense where max_density is less."""
        s = self.settings
        assert s.target_error is not None
        if s.target_error < FIRST_TARGET:
            need = self._need(FIRST_DENSITY, FIRST_TARGET)
            self.pays = need <= s.max_density
            if self.pays:
                self.density = need

    def _trial(self, dense: Decision) -> Decision:
        """The dense decision, with what there is to try in it: never more than what the layer may use."""
        s = self.settings
        if s.target_error is not None:
            low, high = TRIAL
            tried = (low * min(1.0, s.max_density / high), min(high, s.max_density))
            return dense._replace(measure=tried, orders=self._orders(), terms=s.first_order)
        return self._try_forms(dense) if s.measure_every else dense

    def _orders(self) -> tuple[str, ...]:
        return ORDERS if self.settings.order == "auto" and self.grid else ()

    def _try_forms(self, decision: Decision) -> Decision:
        """The decision with all forms to try at the layer's density, if there are several."""
        orders, terms = self._orders(), self.settings.first_order
        if self.density is None or not (orders or terms):
            return decision
        return decision._replace(measure=(self.density,), orders=orders, terms=terms)

    def _is_due(self, step: int, num_steps: int) -> bool:
        """Whether the call of this step is to be measured, if any is."""
        every, left = self.settings.measure_every, num_steps - 1 - step
        often = self._sparse_calls % every == 0
        if self._often and left > 0:
            often = left % min(every, LAG) == 0
        in_doubt = self.strikes == 1 and not self._unread
        return often or in_doubt or self._sparse_calls < FIRST_CALLS or self._is_new()

    def _is_new(self) -> bool:
        """Whether no measurement was made near the density that is now thought right."""
        last = self._measured_at
        return self.density != last and (
            last is None or self.density is None or abs(math.log(self.density / last)) > NEWS
        )

    def _learn(self, entry: Step) -> None:
        assert entry.sums is not None
        sums, decision = entry.sums.read(), entry.decision
        own = 0 if decision.dense else 1
        if len(sums) > own and (decision.orders or decision.terms):
            sums = self._choose(sums[own:], decision)
        errors = [max(error_of(*call).call, 1e-9) for call in sums]
        if any(math.isnan(error) for error in errors):
            return
        if entry.decision.dense:
            if self.settings.target_error is not None:
                self._learn_trial(entry, errors)
            return
        if not self.pays:
            return  # measured before the layer went dense: a trial is what counts now
        (error,) = errors
        target = self.settings.target_error
        if error > self.settings.guard and (decision.density or 0.0) >= (self.density or 0.0):
            self.strikes += 1
            if target is None or self.density is None or self.strikes > 1:
                self.guarded = error
            else:
                self.least = min(self.density * (1 + NEWS), self.settings.max_density)
        elif error <= self.settings.guard:
            self.strikes = 0
        if target is not None and decision.density is not None:
            need = self._bounded(self._need(decision.density, error))
            # What was measured at a higher density has led down already: further down goes what comes next.
            if self.density is None or not need < self.density < decision.density:
                self._move(need)

    def _choose(self, sums: Tensor, decision: Decision) -> Tensor:
        """sums [orders * densities * forms,2,B,H] of a trial: chooses, and returns those of the choice."""
        sums = sums.unflatten(0, (max(len(decision.orders), 1), -1, 1 + decision.terms))
        losses = losses_of(sums)
        self._losses = losses if self._losses is None else (self._losses + losses) / 2
        order, form = choose(self._losses)
        if decision.orders:
            before, self.split_heads = self.split_heads, heads_of(order)
            self._anew = self._anew or self.split_heads != before
        if decision.terms:
            self.first_order = heads_of(form)
        return sums[order, :, form, :, :, torch.arange(len(order))].permute(1, 2, 3, 0)

    def _learn_trial(self, entry: Step, errors: list[float]) -> None:
        assert entry.decision.measure
        (low, high), (first, second) = entry.decision.measure, errors
        fallen = math.log(first / second) if max(errors) < math.inf else 0.0
        self.rate = min(max(fallen / (span(high) - span(low)), RATES[0]), RATES[1])
        self._move(self._bounded(self._need(high, second)), whole=True)

    def _need(self, density: float, error: float) -> float:
        """The density that meets the target, if this one has this error."""
        assert self.settings.target_error is not None
        return density_of(span(density) + math.log(error / self.settings.target_error) / self.rate)

    def _bounded(self, need: float) -> float:
        """The density that is needed, remembered: it falls by no more than LOWER from what was, or, where the
        layer was dense, from what would have paid."""
        if self._needed < math.inf:
            lower = LOWER_LATE if self._often and self.pays else LOWER
            need = max(need, density_of(span(self._needed) - lower / self.rate))
        self._needed = min(need, self.settings.max_density * (1 + HYSTERESIS))
        return need

    def _move(self, need: float, whole: bool = False) -> None:
        """Towards the density that is needed, and a little more."""
        s = self.settings
        assert self.density is not None
        self.steered = True
        self.pays = need <= s.max_density * (1 if whole else 1 + HYSTERESIS)
        if not self.pays:
            return
        way = math.log(density_of(span(need) - math.log(AIM) / self.rate) / self.density)
        if abs(way) > HYSTERESIS:
            least = max(s.min_density, self.least, 0.0 if whole else HALF * self.density)
            self.density = min(max(self.density * math.exp(way), least), s.max_density)
