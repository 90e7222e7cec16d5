"""What a layer decides from what it measured, in worlds where the error at each density is known."""

from __future__ import annotations

import math
import random

import pytest
import torch
from worlds import MEASURED, STEPS, WARM_UP, generation, make, measured, power, sums

from svg_ear_compile import control
from svg_ear_compile.control import (
    AIM,
    FIRST_DENSITY,
    FIRST_TARGET,
    HYSTERESIS,
    LAG,
    LATE,
    LATE_OF_FEW,
    OFTEN,
    RATE,
    RETRY,
    TRIAL,
    Decision,
)
from svg_ear_compile.schedule import FEW_STEPS
from svg_ear_compile.sums import Sums


@pytest.mark.parametrize("needed", [0.08, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("model", MEASURED)
@pytest.mark.parametrize("warm_up", [0, 1, 6])
def test_it_meets_the_target(needed: float, model: str, warm_up: int) -> None:
    world = measured(model, needed)
    steps = generation(make(target_error=0.04), world, warm_up=warm_up)[warm_up:]
    sparse = [s for s in steps if not s.decision.dense]
    ending = [s.step for s in steps if s.decision.dense]
    assert not ending or (needed == 0.5 and min(ending) > LATE[0] * STEPS), "max_density leaves too little"
    densities = [s.decision.density or 0.0 for s in sparse]
    errors = [world(d, 0) for d in densities]
    assert all(error <= 1.5 * 0.04 for error in errors[LAG + 1 :])
    last = int(LATE[0] * STEPS) - warm_up
    assert errors[last] >= 0.04 / 1.5, "and spends little more than is needed"
    assert errors[-1] >= 0.04 / 1.5 / LATE[1], "before the last steps, which have something to spare"
    if warm_up >= LAG:
        assert 0.04 / 1.5 <= errors[0] <= 1.2 * 0.04, "tried before the first sparse step"


@pytest.mark.parametrize("needed", [0.15, 0.3])
@pytest.mark.parametrize("slope", [0.6, 1.0, 2.0])
def test_errors_that_fall_otherwise_are_met_too(needed: float, slope: float) -> None:
    """Like a power of the density: later, as the density that is needed is misjudged at first."""
    decisions = [s.decision for s in generation(make(target_error=0.04), power(needed, slope))][WARM_UP:]
    errors = [0.0 if d.dense else power(needed, slope)(d.density or 0.0, 0) for d in decisions]
    assert max(errors) <= 3 * 0.04
    late = int(LATE[0] * STEPS) - 2 * WARM_UP
    assert all(0.04 / 1.5 <= error <= 1.5 * 0.04 for error in errors[late // 2 : late])
    assert max(errors[late:]) <= 1.5 * 0.04


def test_one_sample_that_is_far_too_low_leads_down_a_little() -> None:
    """In some layers most of the error lies in few rows, which a sample may all miss."""
    world, missed = measured("wan", 0.3), 15

    def sampled(density: float, step: int) -> float:
        return world(density, step) * (0.2 if step == missed else 1.0)

    steps = generation(make(target_error=0.04, measure_every=1), sampled)
    assert all(world(s.decision.density or 0.0, 0) <= 1.5 * 0.04 for s in steps[WARM_UP:])
    assert (steps[missed + LAG].decision.density or 0.0) < (steps[missed].decision.density or 0.0)


def test_it_follows_an_error_that_grows_and_shrinks() -> None:
    def world(density: float, step: int) -> float:
        return 0.04 * (density / (0.2 * (1 + 0.5 * math.sin(step / 5)))) ** -1.2

    sparse = [s for s in generation(make(target_error=0.04), world, 50) if not s.decision.dense]
    late = [world(s.decision.density or 0.0, s.step) / 0.04 for s in sparse[2:]]
    assert max(late) < 3
    assert sum(ratio <= 1.5 for ratio in late) >= 0.9 * len(late)


def test_noise_of_the_measurement_is_tolerated() -> None:
    noise = random.Random(0)
    exact = power(0.2, 1.0)
    steps = generation(make(target_error=0.04), lambda d, s: exact(d, s) * math.exp(noise.gauss(0, 0.1)))
    late = [exact(s.decision.density or 0.0, 0) for s in steps[WARM_UP + 2 :]]
    assert max(late) <= 1.5 * 0.04
    assert not any(s.decision.dense for s in steps[WARM_UP:])


def test_without_a_warm_up_it_starts_cautiously() -> None:
    steps = generation(make(target_error=0.04), power(0.1, 1.0), warm_up=0)
    assert [s.decision.density for s in steps[:LAG]] == [FIRST_DENSITY] * LAG
    assert (steps[LAG].decision.density or 1) < FIRST_DENSITY


def test_it_measures_every_so_often_and_what_is_new() -> None:
    world = power(0.2, 1.0)
    for target, late in ((0.04, [21, 26]), (0.02, [21, 23, 25, 27])):
        one = make(target_error=target, measure_every=5, first_order=False)
        steps = generation(one, lambda d, s: world(d, s) * target / 0.04)  # noqa: B023 - runs at once
        assert [s.step for s in steps if s.sums] == [WARM_UP - LAG, 6, 7, 8, 11, 16, *late]
    often = [s.step for s in generation(make(target_error=0.02, measure_every=1), world) if s.sums]
    assert often == [WARM_UP - LAG, *range(WARM_UP, STEPS)]
    assert not any(s.sums for s in generation(make(density=0.2, measure_every=0), power(0.2, 1.0)))
    easier = lambda d, step: power(0.2 if step < 20 else 0.05, 1.0)(d, step)  # noqa: E731
    steps = generation(make(target_error=0.04, measure_every=15, first_order=False), easier)
    measured = [s.step for s in steps if s.sums]
    assert measured[4:] == [21, 21 + LAG, 21 + 2 * LAG], "a new density, each time"


def test_a_decision_knows_what_is_two_steps_old_and_nothing_newer() -> None:
    """Whatever is measured at step s, the decisions at s and s + 1 are the same."""

    def decisions(late: float) -> list[Decision]:
        steps = generation(
            make(target_error=0.04, measure_every=1), lambda d, s: late if s >= 20 else 0.04 * 0.2 / d
        )
        return [s.decision for s in steps]

    calm, wild = decisions(0.04), decisions(10.0)
    assert calm[: 20 + LAG] == wild[: 20 + LAG]
    assert calm[20 + LAG] != wild[20 + LAG]


@pytest.mark.parametrize(
    ("target", "density"),
    [(0.2, FIRST_DENSITY), (FIRST_TARGET, FIRST_DENSITY),
     (FIRST_TARGET / 2, FIRST_DENSITY + math.log(2) / RATE), (FIRST_TARGET / 4, None),
     (FIRST_TARGET / 8, None)],
)  # fmt: skip
def test_of_few_steps_a_small_target_begins_denser_until_something_is_read(
    target: float, density: float | None
) -> None:
    """None: dense, as max_density is 0.6."""
    world = power(0.1, 1.0, target)
    steps = generation(make(target_error=target), world, 4, warm_up=1)
    blind = steps[1].decision
    assert blind.density == pytest.approx(density)
    assert blind.counter == ("" if density else "nothing measured yet")
    assert blind.measure == (() if density else None), "the trial of step 0 is on its way"
    assert all((s.decision.density or 1.0) < FIRST_DENSITY for s in steps[LAG:]), "read two steps later"

    untried = generation(make(target_error=target), world, 4, warm_up=0)
    assert [s.decision.density for s in untried[:LAG]] == [pytest.approx(density)] * LAG
    assert (untried[0].decision.measure == TRIAL) == (density is None), "a dense call can try"
    assert all((s.decision.density or 1.0) < FIRST_DENSITY for s in untried[LAG:])


@pytest.mark.parametrize(("target", "growth"), [(0.04, 4), (0.01, 6)])
@pytest.mark.parametrize("steps", [8, 12, FEW_STEPS])
def test_of_few_steps_the_last_have_density_to_spare(steps: int, target: float, growth: float) -> None:
    """Errors that grow so many times in the last two steps stay within three times the target."""
    calm = power(0.2, 1.0, target)

    def world(density: float, step: int) -> float:
        return calm(density, step) * (growth if step >= steps - LAG else 1)

    ends = [generation(make(target_error=target), w, steps, LAG)[-1] for w in (world, calm)]
    assert ends[0].decision.density == ends[1].decision.density, "what the last steps show comes too late"
    density = ends[0].decision.density or 0.0
    spare = math.log(LATE_OF_FEW[1] * math.sqrt(0.04 / target)) / RATE
    assert 0.2 / AIM < density <= 0.2 / AIM * (1 + HYSTERESIS) + 1.5 * spare
    assert world(density, steps - 1) <= 3 * target


def test_with_more_steps_all_but_the_last_are_the_same_whatever_their_number() -> None:
    def decisions(num_steps: int, warm_up: int) -> list[Decision]:
        control, found = make(target_error=0.01, first_order=False), []
        for step in range(int(OFTEN * FEW_STEPS)):  # behind them the last of 17 begin
            first = step < warm_up
            found.append(control.warm_up(step, warm_up) if first else control.decide(step, False, num_steps))
            densities = found[-1].measure if found[-1].dense else (found[-1].density,)
            errors = [power(0.2, 1.0, 0.01)(d, step) for d in densities or () if d]
            control.ran(step, found[-1], None if found[-1].measure is None else sums(*errors))
        return found

    for warm_up in (0, 1, 4):
        assert decisions(FEW_STEPS + 1, warm_up) == decisions(30, warm_up) == decisions(50, warm_up)
        assert decisions(FEW_STEPS, warm_up) != decisions(50, warm_up)


def test_where_it_would_not_pay_it_is_dense_and_tries_again() -> None:
    hard = lambda density, step: 1.0 if step < 15 else 0.04 * 0.2 / density  # noqa: E731
    steps = generation(make(target_error=0.04), hard)
    reasons = [s.decision.counter for s in steps[WARM_UP:]]
    assert reasons[0] == "sparsity would not pay"
    assert "needs more than max_density" in (steps[WARM_UP].decision.dense or "")
    tried = [s.step for s in steps if s.sums and s.decision.dense]
    assert tried == [4, 4 + RETRY, 4 + 2 * RETRY]
    assert [s.step for s in steps if not s.decision.dense] == list(range(4 + 2 * RETRY + LAG, STEPS))
    assert not any(s.error() for s in steps if s.decision.dense), "a trial is no error of the output"
    assert (steps[4 + 2 * RETRY + LAG].decision.density or 0.0) > 0.5, "one trial leads down a little"


def test_a_slightly_larger_need_than_max_density_is_no_reason_to_go_dense() -> None:
    steps = generation(make(target_error=0.04, max_density=0.3), power(0.315, 1.0), warm_up=0)
    assert not any(s.decision.dense for s in steps if s.step < LATE[0] * STEPS)


@pytest.mark.parametrize(("needed", "dense"), [(0.2, 0), (0.55, 1)])
def test_the_last_steps_are_dense_where_max_density_leaves_nothing_to_spare(
    needed: float, dense: int
) -> None:
    """Errors that grow 2.5 times in the last two steps stay within twice the target, or are none."""

    calm = measured("wan", needed)

    def world(density: float, step: int) -> float:
        return calm(density, step) * (2.5 if step >= STEPS - LAG else 1)

    steps = generation(make(target_error=0.04), world)[WARM_UP:]
    reasons = [s.decision.dense for s in steps if s.decision.dense]
    assert reasons == ["an error of 0.04 needs more than max_density at the end"] * dense
    assert steps[-1].decision.counter == ("sparsity would not pay" if dense else "")
    errors = [world(s.decision.density or 1.0, s.step) for s in steps if not s.decision.dense]
    assert max(errors) <= 2 * 0.04


def test_the_guard_of_a_fixed_density() -> None:
    steps = generation(make(density=0.2, max_error=0.1), lambda d, s: 0.05 if s < 13 else 0.2)
    counters = [s.decision.counter for s in steps]
    assert counters[:16] == ["warm-up steps"] * 6 + [""] * 10, "measured at 10 and 14; known two steps later"
    assert set(counters[16:]) == {"error beyond max_error"}
    assert steps[-1].decision.dense == "its error was 0.2, more than max_error 0.1"
    silent = generation(make(density=0.2, max_error=0.3), lambda d, s: 0.2)
    assert not any(s.decision.dense for s in silent[WARM_UP:])
    off = generation(make(density=0.2, max_error=0), lambda d, s: 9.0)
    assert not any(s.decision.dense for s in off[WARM_UP:])


def test_the_guard_of_a_target_gives_a_higher_density_a_chance() -> None:
    def world(density: float, step: int) -> float:
        return 0.04 * 0.1 / density if step < 12 else 0.13

    steps = generation(make(target_error=0.04, max_density=1.0), world)
    assert [s.decision.density for s in steps if s.step == 12] != [1.0]
    assert steps[-1].decision.counter == "error beyond max_error"
    chance = [s.decision.density or 0.0 for s in steps if not s.decision.dense]
    assert chance[-1] > 1.5 * chance[0]


@pytest.mark.parametrize("needed", [0.2, 0.6])
def test_one_sample_that_is_far_too_high_does_not_alarm_the_guard(needed: float) -> None:
    """At max_density neither, where no higher density can get a chance: the next call is measured."""
    world, options = measured("wan", needed), {"target_error": 0.04, "max_density": 0.9, "first_order": False}
    steps = generation(make(**options), lambda d, s: world(d, s) * (8 if s == 11 else 1))
    assert not any(s.decision.counter == "error beyond max_error" for s in steps)
    assert [s.step for s in steps if s.sums and 11 <= s.step < 16] == [11, 13], "known two steps later"


@pytest.mark.parametrize("bad", [math.inf, 1e30])
def test_an_infinite_error_makes_it_dense(bad: float) -> None:
    for options in ({"density": 0.2, "max_error": 0.1}, {"target_error": 0.04}):
        for warm_up in (0, WARM_UP):
            steps = generation(make(**options), lambda d, s: bad, warm_up=warm_up)
            assert all(s.decision.dense for s in steps[max(warm_up, LAG) + LAG :])


def test_trials_of_which_one_is_infinite() -> None:
    steps = generation(make(target_error=0.04), lambda d, s: math.inf if d == TRIAL[0] else 0.04)
    assert not steps[WARM_UP].decision.dense


def test_what_is_not_a_number_says_nothing() -> None:
    control = make(target_error=0.04)
    for step in range(8):
        decision = control.decide(step)
        control.ran(step, decision, torch.full((1, 2, 1, 2), math.nan))
        assert (decision.dense, decision.density) == (None, FIRST_DENSITY)


def test_densities_stay_within_their_bounds() -> None:
    for needed in (0.001, 0.58):
        for warm_up in (0, WARM_UP):
            control = make(target_error=0.04, min_density=0.1, max_density=0.25)
            steps = generation(control, power(needed, 1.0), warm_up=warm_up)
            for s in steps[warm_up:]:
                assert s.decision.dense or 0.1 <= (s.decision.density or 0) <= 0.25
            tried = [d for s in steps if s.decision.dense for d in s.decision.measure or ()]
            assert all(d <= 0.25 for d in tried)


def test_without_a_target_the_density_is_the_one_that_was_set() -> None:
    for options, density in (({"density": 0.3, "first_order": False}, 0.3), ({"preset": "svg_ear"}, None)):
        control = make(**options)
        assert all(control.warm_up(step, 6).measure is None for step in range(6))
        assert {control.decide(step).density for step in range(6, 20)} == {density}


def test_nothing_is_read_or_measured_while_a_graph_is_recorded() -> None:
    frozen = make(target_error=0.04)
    frozen.ran(0, Decision(density=0.4, measure=()), sums(9.0))
    assert frozen.decide(5, frozen=True) == Decision(density=FIRST_DENSITY, anew=True)
    assert frozen.decide(6).dense


def test_errors_of_sums() -> None:
    lost, whole = torch.tensor([[1.0, 4.0]]), torch.tensor([[100.0, 25.0]])
    ((call, worst),) = Sums(torch.stack([lost, whole])[None]).errors()
    assert (call, worst) == pytest.approx((math.sqrt(5 / 125), 0.4))

    def error(lost: float, whole: float) -> float:
        """Of two heads, the other with 1 of 100 lost."""
        return Sums(torch.tensor([[[[1.0, lost]], [[100.0, whole]]]])).errors()[0].call

    assert error(math.nan, math.nan) == pytest.approx(0.1), "exact attention is not finite: says nothing"
    assert error(math.nan, 100.0) == math.inf, "the output is not finite where exact attention is"
    assert math.isnan(Sums(torch.full((1, 2, 1, 2), math.nan)).errors()[0].call)
    found = Sums(torch.stack([lost, whole])[None])
    assert found.read() is found.read(), "read once"


def test_the_same_measurements_the_same_decisions() -> None:
    first, second = (
        [s.decision for s in generation(make(target_error=0.04), power(0.2, 0.7))] for _ in range(2)
    )
    assert first == second
    assert control.LAG == 2
