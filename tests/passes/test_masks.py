"""Masks that hide keys become key padding, however they are written; all else stays dense with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Captured, Knobs, hosted
from models.graphs import captured, heads, tokens, video
from torch import Tensor, fx

from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.sizes import shape

S = 72
PADDING = torch.arange(S)[None].expand(2, S) < torch.tensor([[60], [72]])
Make = Callable[[Tensor], Tensor]


def attend(make: Make) -> Callable[[Tensor, Tensor], Tensor]:
    def f(clip: Tensor, padding: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=make(padding))

    return f


def graph_of(make: Make, padding: Tensor = PADDING, **how: Any) -> Captured:
    return captured(attend(make), video().expand(len(padding), -1, -1, -1, -1).contiguous(), padding, **how)


def rewritten(graph: Captured) -> fx.Graph:
    return rewrite(graph.gm, graph.sites, Knobs())


def by_repeat(m: Tensor) -> Tensor:
    rows = m.view(m.shape[0], 1, 1, -1).repeat(1, 1, S, 1)
    return (rows & rows.transpose(2, 3)).bool()


def by_broadcast(m: Tensor) -> Tensor:
    return m[:, None, None, :] & m[:, None, :, None]


def by_expand(m: Tensor) -> Tensor:
    rows = m.unsqueeze(1).unsqueeze(2)
    return torch.logical_and(rows.transpose(-1, -2), rows.expand(-1, -1, S, -1))


def bias(m: Tensor) -> Tensor:
    return ((1 - m.float()) * -10000.0)[:, None, None]


def bias_by_heads(m: Tensor) -> Tensor:
    flat = ((1 - m.to(torch.float32)) * -10000.0).unsqueeze(1).repeat_interleave(2, dim=0)
    return flat.view(m.shape[0], 2, -1, S)


def bias_by_where(m: Tensor) -> Tensor:
    return torch.where(m.view(m.shape[0], 1, 1, -1), 0.0, float("-inf"))


def bias_other_way(m: Tensor) -> Tensor:
    return ((m.float() - 1.0) * 1e9).view(m.shape[0], 1, 1, -1)


@pytest.mark.parametrize(
    "make", [by_repeat, by_broadcast, by_expand, bias, bias_by_heads, bias_by_where, bias_other_way]
)
def test_becomes_key_padding(make: Make) -> None:
    graph = graph_of(make)
    (site,) = graph.sites
    assert site.verdict.rewrite, str(site.verdict)
    assert "key padding" in site.mask
    clip = torch.randn(2, 32, 3, 4, 6)
    expected = attend(make)(clip, PADDING)
    new = rewritten(graph)
    assert not [node for node in new.nodes if (shape(node) or ())[-2:] == (S, S)], "nothing of size S x S"
    graph.gm.graph = new
    values = {"l_clip_": clip, "l_padding_": PADDING}
    inputs = [values[node.name] for node in new.find_nodes(op="placeholder")]
    torch.testing.assert_close(hosted(graph.gm)(*inputs)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [by_repeat, bias_by_heads])
def test_dynamic_shapes(make: Make) -> None:
    assert graph_of(make, dynamic=True).sites[0].verdict.rewrite


def test_padded_queries_of_an_outer_product_are_zero() -> None:
    out = attend(by_broadcast)(torch.randn(2, 32, 3, 4, 6), PADDING)
    assert out[0, :, 60:].abs().max() == 0, "what scaled_dot_product_attention does, and so must we"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: m[:, None, None, :] & m.roll(1, 1)[:, None, :, None], "MASK"),  # two vectors
        (lambda m: m[:, None, None, :] | m[:, None, :, None], "MASK"),
        (lambda m: m[:, :S][:, None, None, :] & m.flip(1)[:, None, :, None], "MASK"),
        (lambda m: ((1 - m.float()) * -5.0)[:, None, None], "MASK_FLOAT"),  # hides nothing
        (lambda m: ((1 - m.float().cumsum(1)) * -1e4)[:, None, None], "MASK_FLOAT"),  # not 0 and 1
        (lambda m: (m.float() * -1e4)[:, None, None], "MASK_FLOAT"),
        (lambda m: ((1 - m.float()) * -1e4).unsqueeze(1).repeat(2, 1, 1).view(2, 2, 1, S), "MASK_FLOAT"),
        (lambda m: torch.where(m, 0.0, -5.0)[:, None, None], "MASK_FLOAT"),
        (lambda m: (torch.arange(S) <= torch.arange(S)[:, None])[None, None], "MASK_CAUSAL"),
    ],
    ids=range(9),
)  # fmt: skip
def test_everything_else_stays_dense(make: Make, reason: str) -> None:
    assert graph_of(make).sites[0].verdict.reason.name == reason


def test_an_integer_mask_proves_nothing() -> None:
    graph = graph_of(lambda m: ((1 - m.float()) * -1e4)[:, None, None], PADDING.long())
    assert graph.sites[0].verdict.reason.name == "MASK_FLOAT"
