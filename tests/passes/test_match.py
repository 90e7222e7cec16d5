"""Every SDPA call is found, whatever its style, with its module and what was forced around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models.graphs import captured
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.passes.fx_utils import readable_path
from svg_ear_compile.passes.match import match

Q = torch.randn(1, 2, 16, 16)


def test_both_styles_of_calls() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, scale=0.5)
        return F.scaled_dot_product_attention(a, k, v, is_causal=True)

    first, second = match(captured(f, Q, Q + 1, Q + 2).graph).calls
    assert [n.name for n in (first.query, first.key, first.value)] == ["l_q_", "l_k_", "l_v_"]
    assert (first.attn_mask, first.dropout_p, first.is_causal, first.scale, first.enable_gqa) == (
        None, 0.0, False, 0.5, False,
    )  # fmt: skip
    assert (second.query, second.is_causal, second.scale) == (first.node, True, None)


def test_module_path_and_class() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(Attention()), nn.Sequential(Attention())])

        def forward(self, q: Tensor) -> Tensor:
            for block in self.blocks:
                q = block(q)
            return q

    calls = match(captured(Model(), Q).graph).calls
    assert [call.module_path for call in calls] == ["blocks.0.0", "blocks.1.0"]
    assert all(call.module_classes[-1].endswith("Attention") for call in calls)


@pytest.mark.parametrize(
    ("path", "readable"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self'].attn1", "attn1"),
        ("L['self']._modules['a']._modules['b']", "a.b"),
        ("L['self']", ""),
        ("L['model'].layers[0].attn", "layers.0.attn"),
        ("L['fn'].self.net", "self.net"),
        ("L['function_reference'].forward.__self__.attn1", "attn1"),
    ],
)
def test_readable_path(path: str, readable: str) -> None:
    assert readable_path(path) == readable


def test_forced_backends_end_with_their_context() -> None:
    def f(q: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(q, q, q)
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
            b = F.scaled_dot_product_attention(a, q, q)
        return F.scaled_dot_product_attention(b, q, q)

    graph = captured(f, Q)
    assert [call.forced_backend for call in match(graph.graph).calls] == ["", "MATH, EFFICIENT_ATTENTION", ""]
    verdict = graph.sites[1].verdict
    assert verdict.reason.name == "FORCED_BACKEND"
    assert verdict.hint == "remove the torch.nn.attention.sdpa_kernel around it"


def test_a_backend_that_diffusers_forces() -> None:
    from models.capture import capture
    from models.tiny import build

    model, arguments = build("wan")
    model.set_attention_backend("_native_math")
    site = capture(model, arguments(3, 4, 6)).sites[0]
    assert site.verdict.reason.name == "FORCED_BACKEND"
    assert site.verdict.hint == 'call model.set_attention_backend("native")'


def test_nothing_to_find() -> None:
    found = match(captured(lambda q: q.softmax(-1), Q).graph)
    assert (found.calls, found.others) == ((), ())
