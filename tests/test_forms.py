"""In which form each head goes after a trial, and when forms are tried."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import STEPS, WARM_UP, generation, make, power, sums

from svg_ear_compile.control import AIM, LAG, MIDDLE, RESPLIT, Control, Decision
from svg_ear_compile.forms import FIRST_ORDER_WORTH, ORDERS, WORTH
from svg_ear_compile.schedule import FEW_STEPS
from svg_ear_compile.settings import resolve


def lost(*errors: Tensor) -> Tensor:
    """Sums of these errors, each [densities, heads]: of forms, form by form inside a density."""
    squares = torch.stack(errors, 1).flatten(0, 1).square()
    return torch.stack([squares, torch.ones_like(squares)], 1)[:, :, None]


def trial_of(
    control: Control, cubes: Tensor, splits: Tensor, cubes_first: Tensor | None = None,
    splits_first: Tensor | None = None,
) -> Decision:  # fmt: skip
    """The decision two steps after a trial with these errors [densities, heads] in the two orders, without
    and with first-order terms, which by default make them larger."""
    decision = control.warm_up(4, WARM_UP)
    assert decision.orders == ORDERS
    assert decision.terms
    cubes_first = 2 * cubes if cubes_first is None else cubes_first
    splits_first = 2 * splits if splits_first is None else splits_first
    control.ran(4, decision, torch.cat([lost(cubes, cubes_first), lost(splits, splits_first)]))
    return control.decide(WARM_UP)


def known(**options: Any) -> Control:
    """Of a layer whose frame grid is known."""
    return Control(resolve(options, {}).settings, grid=True)


CUBES = torch.tensor([[0.10, 0.10, 0.10], [0.03, 0.03, 0.03]])


def test_a_head_goes_by_splits_where_its_error_is_clearly_smaller() -> None:
    better = CUBES * torch.tensor([0.9 * WORTH, 1.1 * WORTH, 3.0])
    for one in (known(target_error=0.04), known(density=0.3)):
        assert trial_of(one, CUBES, better).split_heads == (True, False, False)
    assert trial_of(known(density=0.3), CUBES, 2 * CUBES).split_heads == ()
    assert trial_of(known(density=0.3), CUBES, torch.full_like(CUBES, math.nan)).split_heads == ()


def test_the_density_is_that_of_the_chosen_order() -> None:
    """Splits at half the error: as if only they had been tried."""
    chosen = trial_of(known(target_error=0.04), CUBES, CUBES / 2)
    alone = make(target_error=0.04, first_order=False)
    decision = alone.warm_up(4, WARM_UP)
    alone.ran(4, decision, lost(CUBES / 2))
    assert chosen.split_heads == (True, True, True)
    assert chosen.density == alone.decide(WARM_UP).density
    assert (chosen.density or 1) < (trial_of(known(target_error=0.04), CUBES, CUBES).density or 0)


def test_a_head_gets_first_order_terms_where_its_error_is_clearly_smaller() -> None:
    """Of four forms the one with the smallest error once its cost is counted."""
    better = CUBES * torch.tensor([0.95, 1.05, 0.3]) * FIRST_ORDER_WORTH
    for one in (known(target_error=0.04), known(density=0.3)):
        chosen = trial_of(one, CUBES, CUBES, better)
        assert (chosen.split_heads, chosen.first_order) == ((), (True, False, True))
    both = CUBES * torch.tensor([0.90, 1.05, 1.05]) * FIRST_ORDER_WORTH * WORTH
    splits = CUBES * torch.tensor([1.0, 0.9, 1.0])
    chosen = trial_of(known(density=0.3), CUBES, splits, better, both)
    assert (chosen.split_heads, chosen.first_order) == ((True, False, False), (True, False, True))
    nothing = torch.full_like(CUBES, math.nan)
    assert trial_of(known(density=0.3), CUBES, nothing, nothing, nothing).first_order == ()
    everything = trial_of(known(density=0.3), nothing, nothing, CUBES, nothing)
    assert (everything.split_heads, everything.first_order) == ((), (True,) * 3)
    endless = torch.full_like(CUBES, math.inf)
    assert trial_of(known(density=0.3), endless, endless, endless, endless).first_order == ()


def test_the_density_is_that_of_the_chosen_form() -> None:
    chosen = trial_of(known(target_error=0.04), 4 * CUBES, 3 * CUBES, CUBES, 2 * CUBES)
    alone = make(target_error=0.04, first_order=False)
    alone.ran(4, alone.warm_up(4, WARM_UP), lost(CUBES))
    assert chosen.first_order == (True,) * 3
    assert chosen.density == alone.decide(WARM_UP).density


def test_forms_are_chosen_again_in_mid_generation() -> None:
    """At its density, once, in a call that makes orders anew; other orders are made at once."""
    control = known(density=0.3)
    assert trial_of(control, CUBES[:1], CUBES[:1]).split_heads == ()
    tries = []
    for step in range(WARM_UP + 1, STEPS):
        decision = control.decide(step, num_steps=STEPS)
        measured = None if decision.measure is None else sums(0.1)
        if decision.orders:
            tries.append(step)
            assert decision.anew
            assert (decision.measure, decision.orders, decision.terms) == ((0.3,), ORDERS, True)
            of_forms = [lost(CUBES[:1], CUBES[:1] / 2), lost(CUBES[:1] / 2, CUBES[:1] / 9)]
            measured = torch.cat([lost(CUBES[:1]), *of_forms])
        control.ran(step, decision, measured)
        if tries and step == tries[0] + 1:
            assert (decision.split_heads, decision.first_order) == ((), ()), "nothing read yet"
        if tries and step == tries[0] + LAG:
            assert (decision.split_heads, decision.first_order) == ((True,) * 3, (True,) * 3)
            assert decision.anew, "no orders of these heads are there"
        if tries and step == tries[0] + LAG + 1:
            assert not decision.anew
    assert len(tries) == 1
    assert MIDDLE * STEPS <= tries[0] < MIDDLE * STEPS + RESPLIT
    few = generation(known(density=0.3), power(0.2, 1.0), FEW_STEPS, WARM_UP)
    assert not any(s.decision.orders for s in few[WARM_UP:]), "few steps are over before it is worth it"


def test_a_trial_counts_as_much_as_those_before() -> None:
    """In the mean of both, splits of the first head err half as much, and those of the second twice."""
    control = known(density=0.3)
    errors = CUBES[:1, :2]
    assert trial_of(control, errors, errors * torch.tensor([1.0, 16.0])).split_heads == ()
    again = Decision(density=0.3, measure=(0.3,), orders=ORDERS, terms=True)
    of_forms = [lost(errors, 2 * errors), lost(errors / 4, errors / 2)]
    control.ran(WARM_UP, again, torch.cat([lost(errors), *of_forms]))
    assert control.decide(WARM_UP + LAG).split_heads == (True, False)


def test_what_is_tried_in_mid_generation_steers() -> None:
    """The error that counts is that of the chosen form; the report shows that of the call itself."""
    control = known(target_error=0.04)
    for step in range(STEPS):
        decision = control.decide(step, num_steps=STEPS)
        measured = None if decision.measure is None else sums(0.04 * AIM)
        if decision.orders:
            halves = lost(torch.full((1, 2), 0.04), torch.full((1, 2), 0.02))
            measured = torch.cat([sums(0.04), halves.clone(), halves])
        control.ran(step, decision, measured)
        if decision.orders:
            before = control.density
            assert control.steps[-1].error() == pytest.approx((0.04, 0.04), rel=0.5)
            break
    control.decide(step + LAG, num_steps=STEPS)
    assert control.first_order == (True, True)
    assert (control.density or 1) < 0.8 * (before or 0)


def test_forms_are_tried_only_where_there_is_a_choice() -> None:
    cubes = {"order": "cubes", "first_order": False}
    for options in (cubes, {"measure_every": 0}):
        assert known(density=0.3, **options).warm_up(4, WARM_UP).measure is None
        assert not any(s.decision.terms for s in generation(known(density=0.3, **options), power(0.2, 1.0)))
    assert make(density=0.3, first_order=False).warm_up(4, WARM_UP).measure is None, "no grid, no cubes"
    assert make(density=0.3).warm_up(4, WARM_UP).orders == ()
    assert make(density=0.3).warm_up(4, WARM_UP).terms
    assert known(target_error=0.04, order="splits").warm_up(4, WARM_UP).orders == ()
    assert known(density=0.3).warm_up(3, WARM_UP).orders == ()
    assert known(density=0.3).warm_up(4, WARM_UP, tries=False).measure is None


def test_orders_are_made_anew_once_in_a_while() -> None:
    sparse = [s.decision for s in generation(make(density=0.3), power(0.2, 1.0)) if not s.decision.dense]
    assert [i for i, decision in enumerate(sparse) if decision.anew] == [0, RESPLIT, 2 * RESPLIT]
    clusters = make(preset="svg_ear")
    assert not any(s.decision.anew for s in generation(clusters, lambda density, step: 0.1))
