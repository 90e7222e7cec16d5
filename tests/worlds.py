"""Generations of one layer in worlds where the error at each density is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svg_ear_compile.control import Control, Step
from svg_ear_compile.settings import resolve

STEPS, WARM_UP = 30, 6
World = Callable[[float, int], float]
"""The relative error at a density and a step."""


def make(**options: Any) -> Control:
    return Control(resolve(options, {}).settings)


def sums(*errors: float) -> Tensor:
    """As the ops leave them: [errors,2,1,2], the second head without error."""
    return torch.tensor([[[[e * e, 0.0]], [[0.5, 0.5]]] for e in errors])


def generation(control: Control, world: World, steps: int = STEPS, warm_up: int = WARM_UP) -> list[Step]:
    for step in range(steps):
        first = step < warm_up
        decision = control.warm_up(step, warm_up) if first else control.decide(step, num_steps=steps)
        measured = None
        if decision.measure is not None:
            own = () if decision.dense else (decision.density,)
            tried = [d for d in decision.measure for _ in range(1 + decision.terms)] * max(
                len(decision.orders), 1
            )
            measured = sums(*(world(d, step) for d in (*own, *tried)))
        control.ran(step, decision, measured)
    return list(control.steps)


def power(needed: float, slope: float, target: float = 0.04) -> World:
    """Meets the target at the density that is needed."""
    return lambda density, step: target * (density / needed) ** -slope


MEASURED = {
    "wan": (0.0695, 0.0481, 0.0373, 0.0210, 0.0080, 0.0028),
    "hunyuan": (0.1477, 0.1177, 0.0934, 0.0643, 0.0323, 0.0150),
    "cogvideox": (0.0837, 0.0597, 0.0464, 0.0269, 0.0122, 0.0057),
}
"""Median errors of the calls of trained tiny models at MEASURED_AT (an H200, centroids alone)."""
MEASURED_AT = (0.1, 0.15, 0.2, 0.3, 0.45, 0.6)


def measured(model: str, needed: float, target: float = 0.04) -> World:
    """Falls as that model's errors do, linear in logarithms between them, and meets the target there."""

    def error(density: float) -> float:
        points = list(zip(map(math.log, MEASURED_AT), map(math.log, MEASURED[model]), strict=True))
        pairs = itertools.pairwise(points)
        x = math.log(density)
        (x0, y0), (x1, y1) = next((p for p in pairs if x <= p[1][0]), (points[-2], points[-1]))
        return math.exp(y0 + (x - x0) * (y1 - y0) / (x1 - x0))

    return lambda density, step: target * error(density) / error(needed)
