"""Models that nobody told us of: one over SDPA, and one built on torch.nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import EAGER, calls, compiled

import svg_ear_compile
from svg_ear_compile import backend
from svg_ear_compile.kernels import planning, reference
from svg_ear_compile.kernels.plan import Plan

pytestmark = pytest.mark.usefixtures("fresh")
WIDTH, HEADS = 64, 2


class Fused(nn.Module):
    """One projection for queries, keys and values, normalised per head; text first in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH // HEADS)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = self.attend(self.norm(q), self.norm(k), v)
        return self.out(out.permute(0, 2, 1, 3).reshape(batch, length, WIDTH))


class ClipDenoiser(nn.Module):
    """Cubes of 1 x 2 x 2 pixels cut out by hand, a prompt in front of them, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.layers = nn.ModuleList(Fused() for _ in range(2))

    def forward(self, clip: Tensor, prompt: Tensor) -> Tensor:
        batch, _, frames, height, width = clip.shape
        cut = clip.reshape(batch, 3, frames, height // 2, 2, width // 2, 2)
        x = self.embed(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        x = torch.cat([prompt, x], dim=1)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)))
        y = self.unembed(x[:, prompt.shape[1] :])
        y = y.reshape(batch, frames, height // 2, width // 2, 3, 2, 2)
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(clip.shape)

    def stand_in(self, attend: Callable[..., Tensor]) -> None:
        for number, layer in enumerate(self.layers):
            layer.attend = lambda q, k, v, n=number: attend(n, q, k, v)


class Encoder(nn.Module):
    """torch.nn.MultiheadAttention over the tokens of a video."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.attend: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        h = self.norm(x)
        if self.attend is None:
            return x + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        packed = F.linear(h, self.attention.in_proj_weight, self.attention.in_proj_bias)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in packed.chunk(3, dim=-1))
        return x + self.attention.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class MultiheadDenoiser(nn.Module):
    """A strided convolution cuts the clip; padding [B,L] is True where a token is to be ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList(Encoder() for _ in range(2))
        self.back = nn.ConvTranspose3d(WIDTH, 3, (1, 2, 2), (1, 2, 2))

    def forward(self, clip: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.patch(clip)
        sizes = x.shape[2:]
        x = x.flatten(2).mT
        for layer in self.layers:
            x = layer(x, padding)
        return self.back(x.mT.unflatten(2, sizes))

    def stand_in(self, attend: Callable[..., Tensor]) -> None:
        for number, layer in enumerate(self.layers):
            layer.attend = lambda q, k, v, n=number: attend(n, q, k, v)


def arguments(name: str) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    clip = torch.randn(2, 3, 5, 18, 22, generator=random)
    if name == "prompt":
        return clip, torch.randn(2, 9, WIDTH, generator=random)
    if name == "padding":
        return clip, torch.arange(495).expand(2, -1) >= torch.tensor([[400], [495]])
    return (clip,)


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = ClipDenoiser() if name == "prompt" else MultiheadDenoiser()
    return made.eval()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[int, Plan]:
    used: dict[int, Plan] = {}
    make_plan = planning.make_plan

    def spy(*args: Any) -> Plan:
        used[args[-1].site] = make_plan(*args)
        return used[args[-1].site]

    monkeypatch.setattr(planning, "make_plan", spy)
    return used


NAMES = ["prompt", "multihead", "padding"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rewritten_and_right_at_density_one(name: str, dynamic: bool) -> None:
    run = compiled(model(name), {**EAGER, "density": 1.0}, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(run(*arguments(name)), model(name)(*arguments(name)), rtol=1e-4, atol=1e-5)
    kind, text = ("joint", 9) if name == "prompt" else ("self", 0)
    sites = [site.decision for site in svg_ear_compile.report().sites]
    assert [(site.kind, site.num_text, site.grid) for site in sites] == [(kind, text, (5, 9, 11))] * 2
    assert calls() == (2, {})


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_right_at_a_third_of_the_blocks(name: str, merge: bool, plans: dict[int, Plan]) -> None:
    run = compiled(model(name), {**EAGER, "density": 0.3, "merge": merge}, fullgraph=True)
    got = run(*arguments(name))
    assert not torch.allclose(got, model(name)(*arguments(name)), rtol=1e-4, atol=1e-5)
    truth = model(name)
    truth.stand_in(
        lambda site, q, k, v: reference.joint_softmax(
            q, reference.remade(plans[site], k, v), q.shape[-1] ** -0.5, torch.float32
        )
    )
    torch.testing.assert_close(got, truth(*arguments(name)), rtol=1e-4, atol=1e-5)


def test_layers_are_told_apart_by_their_packed_weights() -> None:
    run = compiled(model("multihead"), {**EAGER, "dense_layers": 1})
    run(*arguments("multihead"))
    assert calls() == (1, {"dense layers": 1})


@pytest.mark.filterwarnings("ignore:svg_ear rewrote none")
@pytest.mark.parametrize("name", ["multihead", "padding"])
def test_a_graph_with_nothing_rewritten_keeps_its_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "_inner", lambda resolved: inner)
    compiled(model(name), {**EAGER, "min_tokens": 10_000})(*arguments(name))
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(F.multi_head_attention_forward) == 2


class OneCall(nn.Module):
    """torch.nn.MultiheadAttention over the tokens of a clip, called in some way."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
        self.fused = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout=0.0, batch_first=True)
        self.call = call

    def forward(self, clip: Tensor) -> Tensor:
        return self.call(self, self.patch(clip).flatten(2).mT)


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


LEFT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "for its keys or values are not its queries": (
        lambda m, x: m.attention(x + 1, x, x, need_weights=False)[0],
        {},
    ),
    "for it has no packed weights": (
        lambda m, x: m.attention(x, x[..., :8], x[..., :8], need_weights=False)[0],
        {"kdim": 8, "vdim": 8},
    ),
    "for its attention weights are used": (lambda m, x: torch.bmm(*m.attention(x, x, x)[::-1]), {}),
    "for it has an attn_mask": (
        lambda m, x: m.attention(x, x, x, attn_mask=causal(495), is_causal=True, need_weights=False)[0],
        {},
    ),
    "for its key_padding_mask is not bool": (
        lambda m, x: m.attention(x, x, x, key_padding_mask=x[..., 0], need_weights=False)[0],
        {},
    ),
    "for it adds keys of its own": (
        lambda m, x: m.attention(x, x, x, need_weights=False)[0],
        {"add_zero_attn": True},
    ),
    "for its input has no batch": (lambda m, x: m.attention(*[x[0]] * 3, need_weights=False)[0], {}),
    "set_fastpath_enabled(False)": (lambda m, x: m.fused(x), {}),
}


@pytest.mark.filterwarnings("ignore:svg_ear rewrote none")
@pytest.mark.parametrize("reason", LEFT)
def test_what_is_more_than_attention_over_itself_is_left_alone_and_named(reason: str) -> None:
    call, options = LEFT[reason]
    other, (clip,) = OneCall(call, **options).eval(), arguments("multihead")
    got = compiled(other, {**EAGER, "sites": "*"})(clip)
    torch.testing.assert_close(got, other(clip))
    assert not svg_ear_compile.report().sites
    text = str(svg_ear_compile.report())
    assert "multi-head attention in one call in " in text
    assert reason in text


@pytest.mark.parametrize(
    "call",
    [lambda m, x: m.attention(x, x, x)[0], lambda m, x: m.fused(x)],
    ids=["weights that nobody uses", "an encoder layer without its fast path"],
)
def test_other_calls_that_are_plain_attention(call: Callable[[Any, Tensor], Tensor]) -> None:
    (clip,) = arguments("multihead")
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        other = OneCall(call).eval()
        got = compiled(other, {**EAGER, "density": 1.0})(clip)
        torch.testing.assert_close(got, other(clip), rtol=1e-4, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert calls() == (1, {})
