"""Which density gives a generation the error that is asked for? Numbers in, a number out.

One density holds for all layers, guidance branches and steps of a generation: errors fall steeply at first and slowly
later, so density taken from a layer costs more than another gains (docs/QUALITY.md). It is steered so that the root
mean square of the relative errors of all sparse calls meets the target T. With e_l the last error of layer l, measured
at density d_l, and span(d) that with which the logarithm of an error falls:

    level = root mean square over l of  e_l exp(rate span(d_l)),    error(d) = level exp(-rate span(d))

What earlier steps erred more or less than T, the steps that are left make up for, within bounds.
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
    """Where nothing was measured yet."""
    rate: float = 5.0
    """The logarithm of an error falls so fast with the density, where nothing was tried. Models: 4 to 7."""
    rates: tuple[float, float] = (2.0, 12.0)
    """What a trial may find."""
    power: float = 0.14
    """Below this density errors fall like a power of it."""
    aim: float = 0.95
    """Of the target: errors grow towards the end, and are noticed a step late."""
    make_up: tuple[float, float] = (0.8, 1.2)
    """Of the target: what the steps that are left may aim at, to make up for those before."""
    few: tuple[int, float] = (16, 1.6)
    """Of up to so many steps the first errs so many times as much as the later ones: that is what it may aim at."""
    lower: float = 0.8
    """In one step the density goes down to this share at most: samples miss rows that err much."""
    hysteresis: float = 0.05
    """Smaller relative changes are not made."""


TUNING = Tuning()


def span(density: float) -> float:
    """What the logarithm of the error falls with: the density d; below `power`, power (1 + ln(d / power))."""
    p = TUNING.power
    return density if density >= p else p * (1 + math.log(density / p))


def density_of(span: float) -> float:
    """The inverse."""
    p = TUNING.power
    return span if span >= p else p * math.exp(span / p - 1)


class Sample(NamedTuple):
    """A measured error of one layer. layer: (model, layer, branch)."""

    layer: Hashable
    density: float
    error: float


@dataclass
class Steering:
    """target: of the root mean square error. least, most: bounds of the density."""

    target: float
    least: float
    most: float
    density: float = field(init=False)
    pays: bool = True
    """Whether the target needs no more than `most`; else calls had better be dense."""
    rate: float = TUNING.rate
    _samples: dict[Hashable, Sample] = field(default_factory=dict)
    _spent: float = 0.0
    _steps: int = 0

    def __post_init__(self) -> None:
        self.density = min(TUNING.first_density, self.most)

    def tried(self, low: list[Sample], high: list[Sample]) -> None:
        """What a trial found at two densities, the same layers in both: how fast errors fall, and where they are."""
        fallen = _rms(s.error for s in low) / _rms(s.error for s in high)
        if 0 < fallen < math.inf:  # else an output was not finite
            rate = math.log(fallen) / (span(high[0].density) - span(low[0].density))
            self.rate = min(max(rate, TUNING.rates[0]), TUNING.rates[1])
        self.measured(high if self.density > math.sqrt(low[0].density * high[0].density) else low)

    def measured(self, samples: list[Sample]) -> None:
        """Newer errors of some layers."""
        self._samples |= {sample.layer: sample for sample in samples}

    def forget(self, layers: set[Hashable]) -> None:
        """These do not run any more. They count as long as nothing is known of those that do."""
        left = {key: sample for key, sample in self._samples.items() if key not in layers}
        self._samples = left or self._samples

    def expected(self, density: float) -> float:
        """The root mean square error at a density; infinite where nothing was measured."""
        if not self._samples:
            return math.inf
        level = _rms(s.error * math.exp(self.rate * span(s.density)) for s in self._samples.values())
        return level * math.exp(-self.rate * span(density))

    def next(self, steps_left: int | None, ran_sparse: bool) -> float:
        """The density of the next step. steps_left: with it, None: unknown. ran_sparse: whether the one before was."""
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
