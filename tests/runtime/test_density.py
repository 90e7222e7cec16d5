"""What a layer does in each call of a generation: warm-up, trials of forms, measurements, the guard."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from svg_ear_compile.precedence import resolve
from svg_ear_compile.runtime.density import BOOST, LAG, RETRY, TRIAL, CallLog, Controller, Decision
from svg_ear_compile.runtime.head_variants import FIRST_ORDER_WORTH, ORDERS, RESPLIT, WORTH
from svg_ear_compile.runtime.layers import MAX_FAILURES, Layer
from svg_ear_compile.runtime.readback import Sums

LAYERS, STEPS, WARM_UP = 4, 30, 3
CUBES = torch.tensor([[0.10, 0.10, 0.10], [0.03, 0.03, 0.03]])
"""Errors [densities, heads]."""


def lost(*errors: Tensor) -> Tensor:
    """Sums of these errors, each [densities, heads]: of forms, form by form inside a density."""
    squares = torch.stack(errors, 1).flatten(0, 1).square()
    return torch.stack([squares, torch.ones_like(squares)], 1)[:, :, None]


def same(decision: Decision, error: float) -> Tensor:
    """What a call measures whose error is this at every density and in every form."""
    assert decision.measure is not None
    forms = max(len(orders(decision)), 1) * (1 + decision.measure.first_order)
    count = len(densities(decision)) * forms + (not decision.dense)
    return lost(torch.full((count, 2), error))


def densities(decision: Decision) -> tuple[float, ...]:
    """The densities of a trial."""
    return () if decision.measure is None else decision.measure.densities


def orders(decision: Decision) -> tuple[str, ...]:
    """The orders of a trial."""
    return () if decision.measure is None else decision.measure.orders


class Run:
    """A generation of LAYERS layers: `log` has every decision."""

    def __init__(self, can_split: bool = True, **options: Any) -> None:
        self.controller = Controller(resolve(options, {}).settings, can_split)
        self.layers = [Layer(number) for number in range(LAYERS)]
        self.log: list[tuple[int, int, int, Decision]] = []

    def __call__(
        self, error: Any = 0.03, steps: int = STEPS, warm_up: int = WARM_UP, branches: int = 1
    ) -> Run:
        """error: a number, or a function of (layer, step, decision) that gives a number or sums."""
        for step in range(steps):
            self.controller.begin(step, warm_up, steps)
            for branch in range(branches):
                for layer in self.layers:
                    decision = self.controller.decide(layer, branch)
                    self.log.append((step, branch, layer.number, decision))
                    sums = None
                    if decision.measure is not None:
                        sums = error(layer.number, step, decision) if callable(error) else error
                        sums = sums if isinstance(sums, Tensor) else same(decision, sums)
                    measured = None if sums is None else Sums(sums)
                    self.controller.ran(layer, CallLog(0, 0, layer.number, branch, step, decision, measured))
        return self

    def of(self, layer: int, branch: int = 0) -> list[Decision]:
        return [decision for _, b, n, decision in self.log if (b, n) == (branch, layer)]


def test_the_first_steps_are_dense_and_all_others_have_one_density() -> None:
    run = Run(target_error=0.04)(branches=2)
    for step in range(STEPS):
        made = [decision for s, _, _, decision in run.log if s == step]
        assert all((d.counter == "warm-up steps") == (step < WARM_UP) for d in made)
        assert len({d.density for d in made}) == 1, "of all layers and branches"
    assert run.of(0)[0].dense == "step 1 of 3 dense warm-up steps"


def test_trials_are_spread_over_the_last_dense_steps_of_the_first_branch() -> None:
    run = Run(target_error=0.04)(branches=2)
    tried = {(step, n) for step, branch, n, d in run.log if d.dense and d.measure is not None}
    assert tried == {(0, 0), (1, 1), (2, 2), (0, 3)}
    assert all(densities(d) == TRIAL for _, _, _, d in run.log if d.dense and densities(d))
    assert not any(orders(d) for _, branch, _, d in run.log if branch), "the choice holds for all branches"


@pytest.mark.parametrize("warm_up", [0, 1])
def test_with_one_dense_step_or_none_forms_are_tried_in_the_first_step(warm_up: int) -> None:
    """No sparse step but that one goes without."""
    run = Run(density=0.3)(warm_up=warm_up)
    assert [(step, n) for step, _, n, d in run.log if orders(d)] == [(0, n) for n in range(LAYERS)]
    assert all(densities(d) == (0.3,) for _, _, _, d in run.log if orders(d))


def test_few_layers_are_measured_in_each_step_and_none_is_starved() -> None:
    run = Run(density=0.3, measure_every=5)(steps=50, warm_up=5)
    sparse = [(step, n) for step, _, n, d in run.log if not d.dense and d.measure is not None]
    for layer in range(LAYERS):
        steps = [step for step, n in sparse if n == layer]
        assert all(b - a == 5 for a, b in itertools.pairwise(steps))
        assert len(steps) == 9
    assert max(sum(s == step for s, _ in sparse) for step in range(50)) == 1


def test_of_few_steps_every_second_call_is_measured() -> None:
    run = Run(density=0.3, measure_every=5)(steps=8, warm_up=1)
    assert sum(d.measure is not None for d in run.of(0)[1:]) == 4


def test_what_is_measured_steers_from_the_next_step_on() -> None:
    high, low = (
        Run(target_error=0.04, max_density=0.95)(error, steps=16, warm_up=0) for error in (0.08, 0.01)
    )
    first = [run.of(0)[0].density for run in (high, low)]
    assert first[0] == first[1], "nothing is known yet"
    assert high.of(0)[LAG].density > first[0] > low.of(0)[LAG].density  # type: ignore[operator]


def test_nothing_is_measured_or_tried_while_a_cuda_graph_is_recorded() -> None:
    controller, layer = Controller(resolve({"target_error": 0.04}, {}).settings, True), Layer(0)
    for step in range(5):
        controller.begin(step, 2, 5)
        assert controller.decide(layer, 0, frozen=True).measure is None


def test_where_sparsity_does_not_pay_layers_are_dense_and_try_again() -> None:
    hopeless = Run(target_error=0.01)(0.5)
    later = [(step, n, d) for step, _, n, d in hopeless.log if step >= WARM_UP]
    assert all(d.counter == "sparsity would not pay" for _, _, d in later)
    tries = [step for step, n, d in later if n == 0 and densities(d)]
    assert all(b - a == RETRY for a, b in itertools.pairwise(tries))
    assert len(tries) >= 3

    def mends(layer: int, step: int, decision: Decision) -> float:
        return 0.5 if step < 15 else 0.002

    assert any(not d.dense for d in Run(target_error=0.01)(mends).of(0)[16 + RETRY :])


def test_a_layer_beyond_the_guard_gets_more_and_then_goes_dense() -> None:
    def one_bad(layer: int, step: int, decision: Decision) -> float:
        return 0.9 if layer == 2 and not decision.dense else 0.03

    run = Run(target_error=0.04)(one_bad)
    bad = [d for d in run.of(2) if not d.dense]
    others = {step: d.density for step, _, n, d in run.log if n == 0}
    boosted = [d for step, _, n, d in run.log if n == 2 and d.density not in (None, others[step])]
    assert boosted
    assert all(d.density == pytest.approx(min(others[3] * BOOST, 0.6), rel=0.5) for d in boosted)
    assert run.of(2)[-1].counter == "error beyond max_error"
    assert run.of(2)[-1].dense == "its error was 0.9, more than 0.16"
    assert len(bad) < 10
    assert all(d.counter != "error beyond max_error" for n in (0, 1, 3) for d in run.of(n))


def test_with_a_set_density_only_max_error_guards_and_at_once() -> None:
    assert not any(d.dense for d in Run(density=0.3)(0.9, warm_up=0).of(0))
    guarded = Run(density=0.3, max_error=0.5)(0.9, warm_up=0)
    assert [bool(d.dense) for d in guarded.of(0)[:3]] == [False, True, True]


def test_dense_layers_and_layers_that_failed_too_often() -> None:
    run = Run(density=0.3, dense_layers="1-2")
    run.layers[3].failures = MAX_FAILURES
    run(steps=4, warm_up=0)
    assert [run.of(n)[0].counter for n in range(LAYERS)] == [
        "",
        "dense layers",
        "dense layers",
        "failed too often",
    ]
    assert not any(densities(d) for n in (1, 2) for d in Run(density=0.3, dense_layers="1-2")().of(n))


def test_orders_are_made_anew_once_in_a_while_for_each_branch() -> None:
    run = Run(density=0.3)(branches=2)
    for branch in range(2):
        sparse = [d for d in run.of(0, branch) if not d.dense]
        assert [i for i, d in enumerate(sparse) if d.anew] == list(range(0, len(sparse), RESPLIT))
    assert not any(d.anew for d in Run(preset="svg_ear")().of(0)), "centroids go on from the last ones"


def chosen(splits: Tensor, cubes_first: Tensor | None = None, splits_first: Tensor | None = None) -> Decision:
    """A sparse call after a trial with these errors: in cubes CUBES; with first-order terms by default twice."""

    def trial(layer: int, step: int, decision: Decision) -> Tensor:
        if not orders(decision):
            return same(decision, 0.03)
        forms = [CUBES, 2 * CUBES if cubes_first is None else cubes_first]
        others = [splits, 2 * splits if splits_first is None else splits_first]
        return torch.cat([lost(*forms), lost(*others)])

    return Run(target_error=0.04)(trial).of(2)[WARM_UP]


def test_a_head_goes_by_splits_where_its_error_is_clearly_smaller() -> None:
    assert chosen(CUBES * torch.tensor([0.9 * WORTH, 1.1 * WORTH, 3.0])).split_heads == (True, False, False)
    assert chosen(2 * CUBES).split_heads == ()
    assert chosen(torch.full_like(CUBES, math.nan)).split_heads == ()


def test_a_head_gets_first_order_terms_where_its_error_is_clearly_smaller() -> None:
    better = CUBES * torch.tensor([0.95, 1.05, 0.3]) * FIRST_ORDER_WORTH
    decision = chosen(CUBES, better)
    assert (decision.split_heads, decision.first_order) == ((), (True, False, True))
    both = CUBES * torch.tensor([0.90, 1.05, 1.05]) * FIRST_ORDER_WORTH * WORTH
    decision = chosen(CUBES * torch.tensor([1.0, 0.9, 1.0]), better, both)
    assert (decision.split_heads, decision.first_order) == ((True, False, False), (True, False, True))


def test_all_heads_have_first_order_terms_until_a_trial_has_chosen() -> None:
    def trial(layer: int, step: int, decision: Decision) -> Tensor:
        forms = len(orders(decision)) * 2
        return lost(torch.tensor([[0.03, 0.03]] + [[0.03, 0.03], [0.01, 0.03]] * (forms // 2)))

    heads = [decision.first_order for decision in Run(density=0.3)(trial, warm_up=0).of(0)]
    assert heads[0] is None, "the first step is sparse, and what it tries is known in the next one"
    assert heads[1:] == [(True, False)] * (len(heads) - 1)
    assert {d.first_order for d in Run(density=0.3, first_order=False)(warm_up=0).of(0)} == {()}
    assert {d.first_order for d in Run(density=0.3, measure_every=0)(warm_up=0).of(0)} == {None}


def test_forms_are_tried_only_where_there_is_a_choice() -> None:
    assert not any(densities(d) for d in Run(density=0.3, order="cubes", first_order=False)().of(0)[:WARM_UP])
    assert not any(d.measure is not None for d in Run(density=0.3, measure_every=0)().of(0))
    alone = Run(can_split=False, density=0.3)().of(0)[0]
    assert alone.measure is not None
    assert (alone.measure.orders, alone.measure.first_order) == ((), True), "no grid, no cubes"
    assert orders(Run(density=0.3)().of(0)[0]) == ORDERS


def test_the_density_begins_where_the_chosen_forms_meet_the_target() -> None:
    """Splits at half the error need less than cubes."""
    few, many = chosen(CUBES / 2).density, chosen(CUBES).density
    assert few is not None
    assert many is not None
    assert few < many


def test_the_first_model_of_two_is_forgotten_once_the_second_runs() -> None:
    controller = Controller(resolve({"target_error": 0.04}, {}).settings, True)
    first, second = Layer(0), Layer(0)
    for step in range(8):
        controller.begin(step, 0, 8)
        layer, model, error = (first, 0, 0.03) if step < 4 else (second, 1, 0.06)
        decision = controller.decide(layer, 0)
        if decision.measure is not None:
            sums = Sums(same(decision, error))
            controller.ran(layer, CallLog(0, model, 0, 0, step, decision, sums))
        else:
            controller.ran(layer, CallLog(0, model, 0, 0, step, decision))
    assert controller.steering is not None
    assert controller.steering.expected(controller.steering.density) == pytest.approx(0.06, rel=0.7)
    assert set(controller.steering._samples) == {(1, 0)}
