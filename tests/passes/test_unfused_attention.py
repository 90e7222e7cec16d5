"""Attention that is no scaled_dot_product_attention call is named, with what to do, and left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.graphs import captured, heads, tokens, video
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Form = Callable[[Tensor, Tensor, Tensor], Any]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * 0.3).softmax(dim=-1) @ v


def cast_and_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT) / 4
    return torch.matmul(F.dropout(F.softmax(scores.float(), dim=-1), 0.1, training=False).to(q.dtype), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3, -1)
    return torch.einsum("bhij,bhjc->bhic", weights, v)


def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return torch.where(scores > 0, scores, -1e9).softmax(-1) @ v


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(2, 72, 72), q, k.transpose(1, 2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v)


def self_attention(form: Form) -> Callable[[Tensor], Any]:
    def f(clip: Tensor) -> Any:
        x = heads(tokens(clip))
        return form(x, x * 0.5, x + 1)

    return f


@pytest.mark.parametrize("form", [plain, cast_and_divided, einsum, hidden, three_dimensions])
def test_written_out(form: Form) -> None:
    graph = captured(self_attention(form), video())
    assert graph.sites == []
    assert graph.others == (
        "attention written out as matrix products (only F.scaled_dot_product_attention is rewritten)",
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        lambda q, k, v: q.softmax(-1) @ v.mT,
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1),
    ],
    ids=["over queries", "of no product", "second"],
)
def test_other_products_are_no_attention(form: Form) -> None:
    graph = captured(self_attention(form), video())
    assert (graph.sites, graph.others) == ([], ())


def test_flex_attention() -> None:
    def masked(q: Tensor) -> Tensor:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
        return flex_attention(q, q, q, block_mask=mask)

    for function in (lambda q: flex_attention(q, q, q), masked):
        graph = captured(function, torch.randn(1, 2, 128, 16))
        assert graph.sites == []
        assert graph.others == ("flex_attention (only F.scaled_dot_product_attention is rewritten)",)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, clip: Tensor) -> Tensor:
        x = tokens(clip)
        return self.attention(x, x, x, need_weights=False)[0] + self.layer(x)


def test_calls_that_are_whole_layers() -> None:
    graph = captured(Encoder().eval(), video())
    assert graph.sites == []
    names = [other.partition(" (")[0] for other in graph.others]
    assert names == [
        "torch.nn's multi_head_attention_forward in attention",
        "torch.nn's _transformer_encoder_layer_fwd in layer",
    ]


@pytest.mark.parametrize("backend", [pytest.param("flex", marks=pytest.mark.slow), "native"])
def test_a_chosen_attention_backend(backend: str) -> None:
    """Whether a model's own code calls it, or a setting of diffusers does, tells what to do."""
    from models.capture import Backend, fresh_dynamo
    from models.tiny import build

    model, arguments = build("wan")
    model.set_attention_backend(backend)
    found = Backend()
    with fresh_dynamo():
        torch.compile(model, backend=found)(**arguments(3, 4, 6))
    others = [other for graph in found.captured for other in graph.others]
    if backend == "native":
        assert others == []
    else:
        assert others[0].startswith(
            "flex_attention in blocks.*.attn1, blocks.*.attn2 (in diffusers, call model.set_attention_b"
        )
