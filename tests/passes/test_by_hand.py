"""Attention that models write out is attention; what only looks like it is named and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Knobs
from models.graphs import captured, heads, tokens, video
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from svg_ear_compile.passes.match import match
from svg_ear_compile.passes.rewrite import rewrite

BIAS = torch.zeros(1, 1, 1, 72)
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * 0.3).softmax(dim=-1) @ v


def cast_and_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / 4
    return torch.matmul(F.dropout(F.softmax(scores.float(), dim=-1), 0.1, training=False).to(q.dtype), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3, -1)
    return torch.einsum("bhij,bhjc->bhic", weights, v)


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.25) @ k.permute(0, 1, 3, 2)).softmax(3) @ v


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, scale=0.3)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3 + q[:, :1, :1, :1] * BIAS).softmax(-1) @ v


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(2, 72, 72), q, k.transpose(1, 2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (1, 2))


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights


def scaled_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) + BIAS) * 0.3).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def self_attention(form: Form) -> Callable[[Tensor], Any]:
    def f(clip: Tensor) -> Any:
        x = heads(tokens(clip))
        return form(x, x * 0.5, x + 1)

    return f


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("form", [plain, cast_and_divided, einsum, unscaled, flex])
def test_rewritten(form: Form, dynamic: bool | None) -> None:
    clip = video()
    graph = captured(self_attention(form), clip, dynamic=dynamic)
    (site,) = graph.sites
    assert site.verdict.rewrite, str(site.verdict)
    assert graph.others == ()
    new = rewrite(graph.gm, graph.sites, Knobs())
    names = {str(node.target) for node in new.nodes}
    assert not [name for name in names if "matmul" in name or "softmax" in name or "einsum" in name], (
        "all dead"
    )
    assert not [name for name in names if name == "flex_attention"]
    if dynamic is None:
        graph.gm.graph = new
        expected = self_attention(plain if form is flex else form)(clip)
        torch.testing.assert_close(graph.gm(clip)[0], expected, atol=1e-5, rtol=1e-4)


LENGTHS = torch.tensor([60, 72])
PADDING = torch.arange(72)[None, None, None] >= LENGTHS[:, None, None, None]  # [2,1,1,72], True where hidden


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)) * 0.3


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, m: s.masked_fill(m, -torch.inf),
    "of the opposite": lambda s, m: s.masked_fill(~m.logical_not(), -torch.inf),
    "lowest": lambda s, m: s.masked_fill(m, torch.finfo(s.dtype).min),
    "zeros hide": lambda s, m: s.masked_fill(m.logical_not().long() == 0, -1e9),
    "scaled afterwards": lambda s, m: (s * 2).masked_fill(m, -1e6) / 2,
    "where seen": lambda s, m: torch.where(~m, s, -torch.inf),
    "where hidden": lambda s, m: torch.where(m, -1e9, s),
    "where tensor": lambda s, m: torch.where(~m, s, torch.tensor(-1e9)),
    "vector": lambda s, m: s.masked_fill(m[:, 0, 0][:, None, None, :], -torch.inf),
}


def masked(how: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def f(clip: Tensor, mask: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return how(weights(x, x * 0.5), mask).softmax(-1) @ (x + 1)

    return f


@pytest.mark.parametrize("how", MASKED)
def test_masks_over_keys(how: str) -> None:
    clip = video().repeat(2, 1, 1, 1, 1)
    graph = captured(masked(MASKED[how]), clip, PADDING)
    (site,) = graph.sites
    assert site.verdict.rewrite, str(site.verdict)
    assert site.mask == "key padding [2,1,1,72] bool"
    expected = masked(MASKED[how])(clip, PADDING)
    graph.gm.graph = rewrite(graph.gm, graph.sites, Knobs())
    values = {"l_clip_": clip, "l_mask_": PADDING}
    inputs = [values[node.name] for node in graph.gm.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(graph.gm(*inputs)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda s, m: s.masked_fill(m | m.mT, -torch.inf), "MASK"),
        (lambda s, m: s.masked_fill(torch.ones(72, 72, dtype=torch.bool).triu(1), -torch.inf), "MASK_CAUSAL"),
        (lambda s, m: torch.where(m.mT, -1e9, s), "MASK"),
    ],
)
def test_other_masks_stay_dense(how: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    (site,) = captured(masked(how), video().repeat(2, 1, 1, 1, 1), PADDING).sites
    assert site.verdict.reason.name == reason


@pytest.mark.parametrize(
    "how",
    [
        lambda s, m: s.masked_fill(m, -5.0),
        lambda s, m: s.masked_fill(m, -1e4) * 0.1,
        lambda s, m: s.masked_fill(m, -1e9).masked_fill(m.roll(1, -1), -1e9),
        lambda s, m: torch.where(m, s, s - 1e9),
        lambda s, m: -s.masked_fill(m, -1e9),
    ],
)
def test_what_does_not_hide_keys_is_named(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = captured(masked(how), video().repeat(2, 1, 1, 1, 1), PADDING)
    assert (graph.sites, graph.others) == ([], ("attention written by hand",))


@pytest.mark.parametrize(("form", "reason"), [(biased, "MASK_FLOAT"), (three_dimensions, "RANK")])
def test_recognised_and_dense(form: Form, reason: str) -> None:
    (site,) = captured(self_attention(form), video()).sites
    assert site.verdict.reason.name == reason


@pytest.mark.parametrize("form", [scores_returned, scaled_bias])
def test_other_forms_are_named(form: Form) -> None:
    graph = captured(self_attention(form), video())
    assert graph.sites == []
    assert graph.others == ("attention written by hand",)


def test_softmax_over_queries_is_no_attention() -> None:
    assert captured(self_attention(over_queries), video()).sites == []


def test_flex_attention_with_functions_is_left_alone() -> None:
    def scored(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + i)

    def masked(q: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
        return flex_attention(q, q, q, block_mask=mask)

    for function in (scored, masked):
        found = match(captured(function, torch.randn(1, 2, 128, 16)).graph)
        assert (found.calls, found.others) == ((), ("flex_attention",))


def test_two_layers_by_hand_are_both_self_attention() -> None:
    def f(clip: Tensor) -> Tensor:
        x = heads(tokens(clip))
        y = einsum(x, x, x)
        return plain(y, y, y)

    assert [site.verdict.rewrite for site in captured(f, video()).sites] == [True, True]
