"""The density follows measured errors: generations in worlds where the error at each density is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.runtime.steering import TUNING, Sample, Steering, density_of, span

LAYERS = 8
# Median errors of the calls of three trained tiny models at these densities (an H200, centroids alone).
AT = (0.1, 0.15, 0.2, 0.3, 0.45, 0.6)
MODELS = {
    "wan": (0.0695, 0.0481, 0.0373, 0.0210, 0.0080, 0.0028),
    "hunyuan": (0.1477, 0.1177, 0.0934, 0.0643, 0.0323, 0.0150),
    "cogvideox": (0.0837, 0.0597, 0.0464, 0.0269, 0.0122, 0.0057),
}
World = Callable[[int, int, float], float]
"""The error of a layer, at a step, at a density."""


def world(model: str, growth: float = 1.0, steps: int = 30) -> World:
    """Errors of that model: layers differ by a factor of 7, and errors grow from the first to the last step."""

    def error(layer: int, step: int, density: float) -> float:
        log = math.log(density)
        points = [(math.log(d), math.log(e)) for d, e in zip(AT, MODELS[model], strict=True)]
        pairs = list(itertools.pairwise(points))
        (x0, y0), (x1, y1) = next((p for p in pairs if log <= p[1][0]), pairs[-1])
        value = math.exp(y0 + (log - x0) * (y1 - y0) / (x1 - x0))
        return value * 7 ** (layer / (LAYERS - 1) - 0.5) * growth ** (step / steps)

    return error


def generation(
    error: World, target: float, steps: int, warm_up: int, every: int
) -> tuple[float, list[float]]:
    """(root mean square of all sparse calls over the target, densities of the sparse steps)."""
    steering = Steering(target, 0.05, 0.95)
    low, high = ([Sample(n, d, error(n, warm_up - 1, d)) for n in range(LAYERS)] for d in (0.15, 0.45))
    if warm_up:
        steering.tried(low, high)
    squares, densities, samples = [], [], []
    for step in range(warm_up, steps):
        steering.measured(samples)
        density = steering.next(steps - step, ran_sparse=step > warm_up)
        densities.append(density)
        squares += [error(layer, step, density) ** 2 for layer in range(LAYERS)]
        due = [n for n in range(LAYERS) if (n + step) % every == 0 or (step == 0 and not warm_up)]
        samples = [Sample(layer, density, error(layer, step, density)) for layer in due]
    return math.sqrt(sum(squares) / len(squares)) / target, densities


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("steps", "warm_up", "every"), [(50, 5, 5), (30, 3, 5), (8, 1, 2), (8, 0, 2)])
@pytest.mark.parametrize("growth", [0.5, 1.0, 3.0])
def test_a_generation_meets_its_target(
    model: str, steps: int, warm_up: int, every: int, growth: float
) -> None:
    for target in (0.025, 0.04, 0.06):
        ratio, densities = generation(world(model, growth, steps), target, steps, warm_up, every)
        if min(densities) > 0.05:
            assert 1 / 1.5 < ratio < 1.5, (target, densities)


def test_the_density_hardly_moves_where_errors_do_not() -> None:
    _, densities = generation(world("wan"), 0.04, 30, 3, 5)
    late = densities[5:]
    assert max(late) / min(late) < 1.2


def test_where_the_target_needs_more_than_there_may_be_it_does_not_pay() -> None:
    steering = Steering(0.01, 0.05, 0.6)
    steering.measured([Sample(0, 0.6, 0.03)])
    steering.next(10, ran_sparse=False)
    assert not steering.pays
    steering.measured([Sample(0, 0.6, 0.005)])
    steering.next(9, ran_sparse=False)
    assert steering.pays


def test_nothing_measured_is_cautious() -> None:
    steering = Steering(0.04, 0.05, 0.6)
    assert steering.next(None, ran_sparse=False) == TUNING.first_density
    assert math.isinf(steering.expected(0.3))


def test_layers_that_do_not_run_any_more_are_forgotten() -> None:
    steering = Steering(0.04, 0.05, 0.6)
    steering.measured([Sample("first model", 0.3, 1.0), Sample("second model", 0.3, 0.04)])
    steering.forget({"first model"})
    assert steering.expected(0.3) == pytest.approx(0.04)


def test_outputs_that_are_not_finite_take_all_the_density_there_is() -> None:
    steering = Steering(0.04, 0.05, 0.6)
    low, high = ([Sample(0, density, math.inf)] for density in (0.15, 0.45))
    steering.tried(low, high)
    steering.next(5, ran_sparse=False)
    assert (steering.rate, steering.density, steering.pays) == (TUNING.rate, 0.6, False)


@given(st.floats(0.001, 1.0))
def test_span_and_its_inverse(density: float) -> None:
    assert density_of(span(density)) == pytest.approx(density)
