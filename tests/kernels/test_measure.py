"""The measured error is the error: against fp64, on all rows and on samples, of calls and of trials."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from op_calls import decided
from torch import Tensor

from svg_ear_compile.exceptions import SiteError
from svg_ear_compile.kernels import context, planning, reference
from svg_ear_compile.kernels.attention import first_order
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.context import Measure
from svg_ear_compile.kernels.measuring import errors as measure
from svg_ear_compile.kernels.measuring import rows_torch as rows

TEXT, GRID = 9, (5, 8, 10)
VIDEO = 5 * 8 * 10
SITE = 2
FAMILIES = [("cubes", "output_error"), ("splits", "output_error"), ("kmeans", "svg_ear")]


def constants(
    order: str = "cubes", routing: str = "output_error", density: float | None = 0.3
) -> SiteConstants:
    return SiteConstants(None, TEXT, False, list(GRID), order, routing, True, density, 0, SITE)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [2,3,409,16], in memory [B,L,H,D]; not all heads are equally hard."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, VIDEO + TEXT, 3, 16, generator=random).transpose(1, 2) for _ in range(3))
    return q * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1), k, v


def mask() -> Tensor:
    """The second batch element has four keys less."""
    seen = torch.ones(2, 1, 1, VIDEO + TEXT, dtype=torch.bool)
    seen[1, ..., -4:] = False
    return seen


def attend(
    call: context.RunContext, c: SiteConstants, attn_mask: Tensor | None = None, merged: bool = True
) -> Tensor:
    qkv = (*inputs(), attn_mask)
    with context.active(call):
        if merged:
            return torch.ops.svg_ear.attention(*qkv, *c)
        plan = torch.ops.svg_ear.clustered_permute(*qkv, *c)
        out, lse = torch.ops.svg_ear.sparse_exact(*qkv, *plan, *c)
        return torch.ops.svg_ear.centroid_compensation(qkv[0], out, lse, *plan, *c)


def call(*densities: float, dense: bool = False, **more: Any) -> context.RunContext:
    more = {"measure": Measure(5, densities), "dense": "a test" if dense else "", **more}
    return decided(constants(), **more)


def sums_of(out: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """(lost, whole) over all rows, float64."""
    exact = reference.dense(*inputs(), attn_mask)
    return torch.stack([(out - exact).square().sum((-1, -2)), exact.square().sum((-1, -2))])


def test_a_sample_has_one_row_of_each_stretch() -> None:
    like = torch.empty(2, 3, 1)
    slots = measure.sample(1000, like, 1, measure.ROWS)
    assert slots.shape == (2, 3, measure.ROWS)
    stretch = torch.arange(measure.ROWS)
    assert ((slots >= stretch * 1000 // measure.ROWS) & (slots < (stretch + 1) * 1000 // measure.ROWS)).all()
    assert torch.equal(slots, measure.sample(1000, like, 1, measure.ROWS))
    assert not torch.equal(slots, measure.sample(1000, like, 2, measure.ROWS))
    assert not torch.equal(slots[0, 0], slots[1, 2]), "each head has rows of its own"
    assert measure.sample(7, like, 1, measure.ROWS)[1, 2].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "rows"),
    [(1, 40, 75600, 64), (2, 40, 75600, 64), (1, 24, 118080, 64), (1, 16, 75600, 128), (1, 2, 75600, 1024),
     (1, 2, 16384, 256), (1, 2, 4096, 64), (1, 2, 100, 64)],
)  # fmt: skip
def test_few_heads_have_more_rows(batch: int, heads: int, length: int, rows: int) -> None:
    like = torch.empty(batch, heads, length, 128, device="meta")
    assert measure.count(like) == rows
    assert measure.count(like, trial=True) == 4 * rows


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("order", "routing"), FAMILIES)
def test_of_all_rows_it_is_the_error(order, routing, masked, merged, monkeypatch) -> None:
    monkeypatch.setattr(measure, "ROWS", 10**6)
    attn_mask, running = mask() if masked else None, call(audit=True)
    out = attend(running, constants(order, routing), attn_mask, merged)
    expected = sums_of(out, attn_mask)
    assert (expected[0] > 1e-3 * expected[1]).all(), "there is something to measure"
    for found in (running.results.measured[SITE], running.results.audited[SITE]):
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=0)


def test_a_sample_is_right_on_average() -> None:
    """200 samples of 64 of 409 rows; the mean's own error is some 1%."""
    query, key, value = inputs()
    out = attend(call(), constants())
    found = torch.zeros(2, 2, 3)
    for seed in range(200):
        slots = measure.sample(query.shape[2], query, seed, measure.ROWS)
        found += measure.output_error(query, key, value, None, out, slots, 16**-0.5)
    expected = sums_of(out) * 200 * measure.ROWS / query.shape[2]
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("order", "routing"), FAMILIES)
def test_a_trial_is_what_the_sparse_call_then_measures(order, routing, masked, monkeypatch) -> None:
    """On all rows: a trial draws tokens, a sparse call slots."""
    monkeypatch.setattr(measure, "ROWS", 10**6)
    attn_mask = mask() if masked else None
    dense, sparse = call(0.15, 0.5, dense=True), call(density=0.5)
    attend(dense, constants(order, routing), attn_mask)
    attend(sparse, constants(order, routing), attn_mask)
    assert dense.results.measured[SITE].shape == (2, 2, 2, 3)
    if order != "kmeans":  # which finds other clusters when it goes on
        torch.testing.assert_close(
            dense.results.measured[SITE][1], sparse.results.measured[SITE][0], rtol=1e-3, atol=1e-9
        )
    few, many = dense.results.measured[SITE][:, 0].sum((1, 2))
    assert 0 < many < 0.8 * few


def test_orders_are_tried_on_the_same_rows() -> None:
    """Each as a site of that order would have measured it, where all rows count."""
    orders, densities = ("cubes", "splits"), (0.2, 0.5)
    measured = Measure(5, densities, orders)
    both = call(measure=measured, dense=True, split_heads=(True, False, True))
    attend(both, constants("auto"))
    assert both.results.measured[SITE].shape == (4, 2, 2, 3)
    assert not both.memo.carried, "orders of a trial are not used again"
    for i, order in enumerate(orders):
        one = call(*densities, dense=True)
        attend(one, constants(order))
        assert torch.equal(both.results.measured[SITE][2 * i : 2 * i + 2], one.results.measured[SITE])
    whole = both.results.measured[SITE][:, 1]
    assert torch.equal(whole, whole[:1].expand_as(whole)), "the same rows, the same exact output"
    assert not torch.equal(both.results.measured[SITE][0], both.results.measured[SITE][2])


@pytest.mark.parametrize("masked", [False, True])
def test_what_no_density_changes_is_made_once(masked, monkeypatch) -> None:
    """And the numbers are those of plans made one by one, to the bit."""
    attn_mask, orders, densities = mask() if masked else None, ("cubes", "splits"), (0.2, 0.5)
    query, key, value = inputs()
    tokens = measure.sample(VIDEO + TEXT, query, 5, measure.count(query, trial=True))
    dense = call(dense=True, measure=None)
    exact = measure.rows(attend(dense, constants(), attn_mask), tokens)
    expected = []
    for order, density in itertools.product(orders, densities):
        with context.active(call(density=density)):
            plan = planning.make_plan(query, key, value, attn_mask, constants(order))
        expected.append(measure.planned_errors(query, [plan], exact, tokens, 0.25, terms=True))

    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: counts.update([name]) or function(*a, **k))

    for module, name in (
        (planning, "arrange"), (planning, "probe"), (planning, "route"), (first_order, "_covariances"),
        (rows, "planned_rows"),
    ):  # fmt: skip
        counted(module, name)
    running = call(measure=Measure(5, densities, orders, True), dense=True)
    attend(running, constants("auto"), attn_mask)
    assert torch.equal(running.results.measured[SITE], torch.cat(expected))
    assert counts == {"arrange": 2, "probe": 2, "route": 4, "_covariances": 2, "planned_rows": 4}


@pytest.mark.parametrize("masked", [False, True])
def test_forms_are_what_sparse_calls_of_them_measure(masked, monkeypatch) -> None:
    """Orders with and without first-order terms, in a dense call and in a sparse one after its own error."""
    monkeypatch.setattr(measure, "ROWS", 10**6)
    attn_mask, orders, forms = mask() if masked else None, ("cubes", "splits"), []
    for order in orders:
        for heads in ((), (True,) * 3):
            one = call(density=0.3, first_order=heads)
            attend(one, constants(order), attn_mask)
            forms.append(one.results.measured[SITE])
    expected = torch.cat(forms)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2), "terms make a difference"
    request = Measure(5, (0.3,), orders, True)
    dense = call(measure=request, dense=True)
    attend(dense, constants("auto"), attn_mask)
    torch.testing.assert_close(dense.results.measured[SITE], expected, rtol=1e-3, atol=1e-9)
    sparse = call(measure=request, split_heads=(True,) * 3, density=0.3)
    attend(sparse, constants("auto"), attn_mask)
    torch.testing.assert_close(sparse.results.measured[SITE][0], expected[2], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(sparse.results.measured[SITE][1:], expected, rtol=1e-3, atol=1e-9)
    apart = call(measure=request, density=0.3)
    attend(apart, constants("cubes"), attn_mask, merged=False)
    assert len(apart.results.measured[SITE]) == 1, "three ops only measure"


def test_a_trial_takes_heads_in_groups_or_at_once(monkeypatch) -> None:
    found = []
    for group in (1, 2**40):
        for module in (rows, first_order):
            monkeypatch.setattr(module, "_CHUNK_BYTES", group)
        running = call(measure=Measure(5, (0.3,), (), True), dense=True)
        attend(running, constants(), mask())
        found.append(running.results.measured[SITE])
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("merged", [True, False])
def test_a_trial_changes_nothing_else(merged) -> None:
    plain, tried = call(measure=None, dense=True), call(0.15, 0.5, dense=True)
    assert torch.equal(attend(plain, constants(), None, merged), attend(tried, constants(), None, merged))
    assert not tried.results.totals
    assert SITE in tried.results.measured


def test_the_call_s_density_wins_over_the_site_s() -> None:
    for density, constant in ((0.2, 0.6), (0.2, None), (1.0, 0.1)):
        running = call(density=density)
        attend(running, constants(density=constant))
        areas = running.results.totals[SITE].areas
        assert areas is not None
        assert density - 0.05 < int(areas[0]) / running.results.totals[SITE].pairs <= density


def test_nothing_is_measured_unasked() -> None:
    running = context.RunContext()
    attend(running, constants())
    assert not running.results.measured
    assert not running.results.audited


@pytest.mark.parametrize("dense", [False, True])
def test_a_failed_measurement_costs_nothing_but_itself(dense, monkeypatch) -> None:
    expected = attend(call(measure=None, dense=dense), constants())
    monkeypatch.setattr(measure, "sample", lambda *_: 1 / 0)
    running = call(*[0.2] * dense, dense=dense, strict=False)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(attend(running, constants()), expected)
        ours = [w for w in caught if "measuring attention site 2 failed" in str(w.message)]
        assert len(ours) == (1 if running.results.fallbacks["not measured: ZeroDivisionError"] == 1 else 0)
    assert running.results.fallbacks["not measured: ZeroDivisionError"] == 2
    running = call(*[0.2] * dense, dense=dense)
    with pytest.raises(SiteError, match="measuring attention site 2"):
        attend(running, constants())
