"""Which density gives a generation the error that was asked for? Numbers in, a number out.

One density holds for all layers, guidance branches and steps of a generation: errors fall steeply at first and slowly
later, so taking density from one layer costs more than another layer gains (docs/QUALITY.md). The density is adjusted
so that the root mean square of the relative errors of all sparse calls meets the target T. With e_l the last error of
layer l, measured at density d_l, and span(d), in which the logarithm of an error is linear:

    level = root mean square over l of  e_l exp(rate span(d_l)),    error(d) = level exp(-rate span(d))

Later steps make up, within bounds, for earlier steps whose error was above or below T.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Tuning(NamedTuple):
    """Constants of the controller. Each was chosen on errors recorded on three small trained models
    (benchmarks/levels.py; docs/TRIED.md)."""

    first_density: float = 0.4
    """The density before anything was measured."""
    rate: float = 5.0
    """How fast the logarithm of an error falls with the density, before a trial. Models: 4 to 7."""
    rates: tuple[float, float] = (2.0, 12.0)
    """The bounds of what a trial may find."""
    power: float = 0.14
    """Below this density, errors fall like a power of the density."""
    aim: float = 0.95
    """The share of the target to aim at: errors grow towards the end, and are seen a step late."""
    make_up: tuple[float, float] = (0.8, 1.2)
    """The shares of the target that remaining steps may aim at, to make up for earlier ones."""
    few: tuple[int, float] = (16, 1.6)
    """In generations of up to 16 steps, the first step errs 1.6 times as much as later ones, and may aim at that."""
    lower: float = 0.8
    """One step lowers the density to this share at most, since samples may miss rows with large errors."""
    hysteresis: float = 0.05
    """Smaller relative changes of the density are not made."""


TUNING = Tuning()


def span(density: float) -> float:
    """What the logarithm of an error is linear in: the density d; below `power`, power (1 + ln(d / power))."""
    p = TUNING.power
    return density if density >= p else p * (1 + math.log(density / p))


def density_of(span: float) -> float:
    """The inverse of span."""
    p = TUNING.power
    return span if span >= p else p * math.exp(span / p - 1)


class Sample(NamedTuple):
    """A measured error of one layer. layer: (model, layer, branch)."""

    layer: Hashable
    density: float
    error: float


@dataclass
class Steering:
    """target: for the root mean square error. least, most: bounds of the density."""

    target: float
    least: float
    most: float
    density: float = field(init=False)
    pays: bool = True
    """Whether the target needs a density of at most `most`; otherwise dense calls are better."""
    rate: float = TUNING.rate
    _samples: dict[Hashable, Sample] = field(default_factory=dict)
    _spent: float = 0.0
    _steps: int = 0

    def __post_init__(self) -> None:
        self.density = min(TUNING.first_density, self.most)

    def tried(self, low: list[Sample], high: list[Sample]) -> None:
        """Takes the results of a trial of the same layers at two densities: how fast errors fall, and their level."""
        fallen = _rms(s.error for s in low) / _rms(s.error for s in high)
        if 0 < fallen < math.inf:  # else an output was not finite
            rate = math.log(fallen) / (span(high[0].density) - span(low[0].density))
            self.rate = min(max(rate, TUNING.rates[0]), TUNING.rates[1])
        self.measured(high if self.density > math.sqrt(low[0].density * high[0].density) else low)

    def measured(self, samples: list[Sample]) -> None:
        """Takes newer errors of some layers."""
        self._samples |= {sample.layer: sample for sample in samples}

    def forget(self, layers: set[Hashable]) -> None:
        """These layers no longer run. They count as long as nothing is known of those that do."""
        left = {key: sample for key, sample in self._samples.items() if key not in layers}
        self._samples = left or self._samples

    def expected(self, density: float) -> float:
        """The root mean square error at a density; infinite if nothing was measured."""
        if not self._samples:
            return math.inf
        level = _rms(s.error * math.exp(self.rate * span(s.density)) for s in self._samples.values())
        return level * math.exp(-self.rate * span(density))

    def next(self, steps_left: int | None, ran_sparse: bool) -> float:
        """The density of the next step.

        steps_left: how many steps are left, with this one; None: unknown. ran_sparse: whether the last step was sparse.
        """
        if not self._samples:
            return self.density
        if ran_sparse:
            self._spent += self.expected(self.density) ** 2
            self._steps += 1
        aim = self.target * TUNING.aim
        if steps_left is not None and self._steps:
            least, most = (bound * aim for bound in TUNING.make_up)
            rest = ((self._steps + steps_left) * aim**2 - self._spent) / steps_left
            aim = min(max(math.sqrt(max(rest, 0.0)), least), most)
        elif steps_left is not None and steps_left <= TUNING.few[0]:
            aim *= TUNING.few[1]
        error = max(self.expected(self.density), 1e-9)
        need = density_of(max(span(self.density) + math.log(error / aim) / self.rate, -2.0))
        self.pays = need <= self.most * (1.1 if self.pays else 1.0)
        if abs(math.log(need / self.density)) > TUNING.hysteresis:
            lower = TUNING.lower * self.density if self._steps else 0.0
            self.density = min(max(need, lower, self.least), self.most)
        return self.density


def _rms(errors: Iterable[float]) -> float:
    squares = [error**2 for error in errors]
    return math.sqrt(sum(squares) / len(squares))
