"""Video, not video, or unknown: what inputs, rotary tables and classes say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.graphs import captured, heads, tokens, video
from torch import Tensor, nn

from svg_ear_compile.passes.classify import pattern_of
from svg_ear_compile.passes.site import Reason, Site

VIDEO, NOT_VIDEO, UNKNOWN = Reason.REWRITTEN, Reason.NOT_VIDEO, Reason.NO_SIGN_OF_VIDEO


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def clip_model(clip: Tensor) -> Tensor:
    return attend(heads(tokens(clip)))


def image_model(picture: Tensor) -> Tensor:
    return attend(heads(tokens(picture)))


def packed(x: Tensor, rotary_emb: Tensor | None = None) -> Tensor:
    return attend(heads(x if rotary_emb is None else x * rotary_emb))


def two_clips(clip: Tensor, other: Tensor) -> Tensor:
    return attend(heads(torch.cat([tokens(clip), tokens(other)], 1)))


def rotary(frames: int, height: int, width: int) -> Tensor:
    """A table [tokens, 32] whose columns turn with time, height and width."""
    place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in (frames, height, width)))
    speed = torch.tensor([1.0, 0.3, 0.1])
    return torch.cat([torch.cos(place * s) for s in speed] * 4, 1)[:, :32].contiguous()


def site_of(function: Callable[..., Any], *args: Tensor, **how: Any) -> Site:
    return captured(function, *args, **how).sites[-1]


X = torch.randn(1, 72, 32)
SEQUENCE = torch.cos(torch.arange(72.0)[:, None] * torch.linspace(0.1, 1, 32))


@pytest.mark.parametrize(
    ("function", "arguments", "reason", "words"),
    [
        (clip_model, (video(),), VIDEO, "frames of a 5-D input, clip"),
        (clip_model, (video(frames=1),), NOT_VIDEO, "one frame of a 5-D input, clip"),
        (image_model, (torch.randn(1, 32, 8, 8),), NOT_VIDEO, "pixels of a 4-D input, picture"),
        (two_clips, (video(frames=1), video(frames=1)), VIDEO, "frames of a 5-D input, clip"),
        (packed, (X, rotary(3, 4, 6)), VIDEO, "rotary tables over 3 x 4 x 6 tokens"),
        (packed, (X, rotary(1, 9, 8)), NOT_VIDEO, "rotary tables over 1 x 9 x 8 tokens"),
        (packed, (X, SEQUENCE), NOT_VIDEO, "its positions are those of a sequence, as of text"),
        (packed, (X,), UNKNOWN, "72 tokens"),
    ],
)
def test_answers(function: Callable[..., Any], arguments: Any, reason: Reason, words: str) -> None:
    site = site_of(function, *arguments)
    assert (site.verdict.reason, site.verdict.detail) == (reason, words)
    assert site.verdict.rewrite == (reason is VIDEO)
    assert site_of(function, *arguments, sites=("*",)).verdict.rewrite, "whoever names it is believed"


def test_no_length_makes_it_video() -> None:
    site = site_of(packed, torch.empty(1, 1 << 20, 32, device="meta"))
    assert (site.verdict.rewrite, site.q_len) == (False, 1 << 20)


def test_an_operand_is_no_picture() -> None:
    """[batch, heads, tokens, head_dim] has four dimensions, too."""
    assert site_of(attend, torch.randn(1, 2, 72, 16)).verdict.reason is UNKNOWN


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("blocks.7.attn1", "blocks.*.attn1"),
        ("attn1", "attn1"),
        ("a.0.1.b2", "a.*.*.b2"),
        ("0", "*"),
        ("", "*"),
    ],
)
def test_patterns_of_paths(path: str, pattern: str) -> None:
    assert pattern_of(path) == pattern


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return packed(x)


def test_the_hint_is_what_helps() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Block())
    (site,) = captured(model, X).sites
    assert site.verdict.reason is UNKNOWN
    assert site.verdict.hint == 'sites="*" rewrites it if they are'

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": Block()})])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0]["attn1"](x)

    (site,) = captured(Model(), X).sites
    assert site.verdict.hint == 'sites="blocks.*.attn1" rewrites it if they are'
    assert captured(Model(), X, sites=("blocks.*.attn1",)).sites[0].verdict.rewrite


@pytest.mark.parametrize("known", [True, False])
def test_frames_of_a_graph_of_any_length(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame today may be several tomorrow, in a class that draws videos: each call sees for itself."""
    from svg_ear_compile.passes import evidence

    monkeypatch.setattr(evidence, "_known_class", lambda call: "transformer_wan" if known else "")
    site = site_of(packed, X, rotary(1, 9, 8), dynamic=True)
    assert (site.verdict.rewrite, site.min_frames) == (known, 2 if known else 0)
    assert site_of(packed, X, rotary(3, 4, 6), dynamic=True).min_frames == 2
    assert site_of(packed, X, rotary(3, 4, 6)).min_frames == 2, "other values of the same size"
    assert site_of(clip_model, video()).min_frames == 0
