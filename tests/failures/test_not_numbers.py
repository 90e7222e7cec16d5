"""NaN and infinity in one head of one batch element: where dense has them, and never in another head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import EAGER, compiled

import svg_ear_compile

pytestmark = pytest.mark.usefixtures("fresh")
BATCH, HEADS, LENGTH, DIM = 2, 3, 300, 16
NOT_NUMBERS = [torch.nan, torch.inf, -torch.inf]


def model(packed: Tensor, mask: Tensor | None) -> Tensor:
    """packed [B,L,3HD] -> heads [B,H,L,D]."""
    q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in packed.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed(bad: float = 0.0, which: int = 0, tokens: tuple[int, ...] = ()) -> Tensor:
    """The same random numbers; `bad` in head 1 of batch element 1 of query, key or value (0, 1, 2)."""
    x = torch.randn(BATCH, LENGTH, 3, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    for token in tokens:
        x[1, token, which, 1, 5] = bad
    return x.flatten(2)


@pytest.mark.parametrize("preset", ["default", "svg_ear"])
@pytest.mark.parametrize("merge", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [True, False])
def test_they_stay_where_they_are(masked: bool, merge: bool, preset: str) -> None:
    options = {**EAGER, "sites": "*", "density": 0.3, "merge": merge, "preset": preset}
    run = compiled(model, {**options, "measure_every": 0})  # or heads would go by other forms after a while
    mask = (torch.arange(LENGTH) < 260).expand(BATCH, 1, 1, -1) if masked else None
    clean = run(packed(), mask)
    assert clean.isfinite().all()
    for bad in NOT_NUMBERS:
        for which, name in enumerate(["query", "key", "value"]):
            for tokens in ((17,), tuple(range(260))):
                arguments = (packed(bad, which, tokens), mask)
                got, dense = run(*arguments), model(*arguments)
                where = f"{bad} in {name} at {len(tokens)} tokens"
                assert (got.isnan() >= dense.isnan()).all(), where
                assert (got.isfinite() <= dense.isfinite()).all(), where
                assert torch.equal(got[0], clean[0]), where
                assert got[1, [0, 2]].isfinite().all(), where
    assert svg_ear_compile.report().totals()["fallbacks"] == {}


@pytest.mark.parametrize("preset", ["default", "svg_ear"])
def test_hidden_keys_may_hold_anything(preset: str) -> None:
    options = {**EAGER, "sites": "*", "density": 0.3, "preset": preset}
    run = compiled(
        model, {**options, "measure_every": 0}
    )  # or heads would go by other forms after the first call
    mask = (torch.arange(LENGTH) < 260).expand(BATCH, 1, 1, -1)
    clean = run(packed(), mask)
    for bad in NOT_NUMBERS:
        for which in (1, 2):
            assert torch.equal(run(packed(bad, which, (270, 299)), mask), clean)


def test_a_shared_budget_is_spent_on_the_others_as_before() -> None:
    """The healthy heads of the same batch element keep their share: they lose no more than half of it."""
    run = compiled(model, {**EAGER, "sites": "*", "density": 0.3})
    clean, exact = run(packed(), None), model(packed(), None)
    got = run(packed(torch.nan, 1, (17,)), None)
    assert (got - exact)[1, [0, 2]].norm() <= 1.5 * (clean - exact)[1, [0, 2]].norm()
