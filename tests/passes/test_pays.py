"""The cost model: near what was measured, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.nn.functional as F
from models.graphs import captured, heads, tokens, video
from torch import Tensor

from svg_ear_compile.passes import pays
from svg_ear_compile.passes.pays import MEASURED, Costs
from svg_ear_compile.passes.site import Reason, Verdict

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "attention_h200.json"
# Milliseconds: nothing pays, and everything does.
SLOW, FAST = Costs(1e12, 1e12, 1e3, 0, 0), Costs(1.0, 1e12, 0, 0, 0)


def records() -> list[dict]:
    return json.loads(RESULTS.read_text())["records"]


@pytest.mark.parametrize("record", records(), ids=lambda r: f"{r['shape']} {r['density']}")
def test_it_is_near_what_was_measured(record: dict) -> None:
    """Within 15%, and on the right side: sparse is predicted to be faster exactly where it was."""
    count, head_dim = map(int, record["heads x d"].split(" x "))
    sizes = (1, count, record["tokens"], head_dim)
    costs = MEASURED[9, 0, head_dim]
    dense, sparse = costs.dense(*sizes), costs.sparse(*sizes, record["density"])
    assert (sparse < dense) == (record["total ms"] < record["dense ms"])
    assert dense == pytest.approx(record["dense ms"], rel=0.15)
    if record["shape"] != "LTX":  # bound by launches, whose times scatter
        assert sparse == pytest.approx(record["total ms"], rel=0.15)


def test_what_it_says_of_a_gpu() -> None:
    """At density 1 nothing pays, a tiny call never, a long one at a low density."""
    for (_, _, head_dim), costs in MEASURED.items():
        long, tiny = (1, 24, 100_000, head_dim), (1, 3, 4096, head_dim)
        assert costs.sparse(*long, 1.0) > costs.dense(*long)
        assert costs.sparse(*tiny, 0.1) > costs.dense(*tiny)
        assert costs.sparse(*long, 0.25) < 0.5 * costs.dense(*long)


def verdict(monkeypatch: pytest.MonkeyPatch, costs: Costs | None, **knobs: object) -> Verdict:
    def attend(clip: Tensor) -> Tensor:
        x = heads(tokens(clip), 1)
        return F.scaled_dot_product_attention(x, x, x)

    monkeypatch.setattr(pays, "costs", lambda query: costs)
    return captured(attend, video(16, 8, 32, 32), density=0.25, **knobs).sites[0].verdict


def test_a_site_that_does_not_pay_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdict(monkeypatch, SLOW, min_tokens=None)
    assert not found.rewrite
    assert found.reason is Reason.DOES_NOT_PAY
    assert found.detail == "1e+03 ms at density 0.25, 0.0043 dense"


@pytest.mark.parametrize(
    ("costs", "knobs"),
    [
        (FAST, {"min_tokens": None}),
        (None, {"min_tokens": None}),  # nothing is known: 8192 tokens are enough
        (SLOW, {"min_tokens": 1}),  # the user says so
    ],
)
def test_others_are_rewritten(
    monkeypatch: pytest.MonkeyPatch, costs: Costs | None, knobs: dict[str, object]
) -> None:
    assert verdict(monkeypatch, costs, **knobs).rewrite
