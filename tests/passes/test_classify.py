"""Each reason to stay dense is given where it applies, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Knobs
from models.graphs import captured, heads, tokens, video
from torch import Tensor, nn

from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.passes.classify import named
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import Reason, Site


def site_of(function: Callable[..., Any], *args: Tensor, **how: Any) -> Site:
    return captured(function, *args, **how).sites[-1]


def self_attention(**arguments: Any) -> Callable[[Tensor], Tensor]:
    def f(clip: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x, **arguments)

    return f


def masked(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def f(clip: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=make(x))

    return f


def test_self_attention_over_video() -> None:
    site = site_of(self_attention(), video())
    assert site.verdict.rewrite
    assert str(site.verdict) == "self attention over video tokens (frames of a 5-D input, clip)"
    assert (site.batch, site.heads, site.head_dim, site.q_len, site.dtype) == (1, 2, 16, 72, "float32")


@pytest.mark.parametrize(
    ("function", "clip", "reason"),
    [
        (self_attention(dropout_p=0.1), video(), Reason.DROPOUT),
        (self_attention(is_causal=True), video(), Reason.CAUSAL),
        (self_attention(), video(16), Reason.HEAD_DIM),
        (self_attention(), video(1024), Reason.HEAD_DIM),
        (self_attention(), video().double(), Reason.DTYPE),
        (lambda clip: F.scaled_dot_product_attention(*[tokens(clip)] * 3), video(), Reason.RANK),
        (masked(lambda x: torch.zeros(1, 1, 72, 72)), video(), Reason.MASK_FLOAT),
        (masked(lambda x: torch.zeros(1, 1, 1, 72)), video(), Reason.MASK_FLOAT),
        (masked(lambda x: torch.ones(72, 72, dtype=torch.bool).tril()), video(), Reason.MASK_CAUSAL),
        (masked(lambda x: torch.ones(1, 2, 1, 72, dtype=torch.bool)), video(), Reason.MASK),
        (masked(lambda x: torch.ones(1, 1, 1, 1, dtype=torch.bool)), video(), Reason.MASK),
    ],
)
def test_what_the_kernels_cannot_do(function: Callable[..., Any], clip: Tensor, reason: Reason) -> None:
    site = site_of(function, clip)
    assert (site.verdict.rewrite, site.verdict.reason) == (False, reason)


@pytest.mark.parametrize("batch", [1, 2])
def test_key_padding_is_supported(batch: int) -> None:
    site = site_of(
        masked(lambda x: torch.ones(batch, 1, 1, 72, dtype=torch.bool)), video().expand(batch, -1, -1, -1, -1)
    )
    assert site.verdict.rewrite
    assert site.mask == f"key padding [{batch},1,1,72] bool"


def test_grouped_queries() -> None:
    def f(clip: Tensor) -> Tensor:
        x = tokens(clip)
        return F.scaled_dot_product_attention(
            heads(x, 2), heads(x[..., :16], 1), heads(x[..., :16], 1), enable_gqa=True
        )

    assert site_of(f, video()).verdict.reason is Reason.GQA


def test_equal_lengths_are_no_self_attention() -> None:
    def f(clip: Tensor, other: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(tokens(clip)), *[heads(tokens(other))] * 2)

    site = site_of(f, video(), video())
    assert (site.kind, site.verdict.reason) == ("cross", Reason.CROSS)


def test_keys_of_one_input_and_values_of_another_are_cross_attention() -> None:
    def f(clip: Tensor, other: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, heads(tokens(other)))

    assert site_of(f, video(), video()).kind == "cross"


def test_lost_tokens_are_unknown_unless_named() -> None:
    def f(clip: Tensor) -> Tensor:
        x = tokens(clip)
        q, k = (heads(x.repeat(1, 2, 1)) for _ in range(2))
        return F.scaled_dot_product_attention(q, k, k)

    assert site_of(f, video()).verdict.reason is Reason.UNKNOWN_TOKENS
    assert site_of(f, video(), sites=("*",)).verdict.rewrite


@pytest.mark.parametrize(("least", "words"), [(72, ""), (73, "72 of at least 73")])
def test_too_few_tokens(least: int, words: str) -> None:
    site = site_of(self_attention(), video(), min_tokens=least)
    assert site.verdict.rewrite == (words == "")
    assert (site.min_tokens, site.min_frames) == (0, 0), "one size, which was looked at already"
    if words:
        assert (site.verdict.reason, site.verdict.detail) == (Reason.TOO_FEW_TOKENS, words)


def test_too_few_tokens_in_a_graph_of_any_length() -> None:
    site = site_of(self_attention(), video(), min_tokens=73, dynamic=True)
    assert (site.verdict.rewrite, site.min_tokens) == (True, 73)
    assert str(site.verdict).endswith("; too few tokens or one frame: decided per call)")
    assert site_of(self_attention(), video(), min_tokens=1, dynamic=True).min_tokens == 0
    assert site_of(self_attention(), video(), min_tokens=None, dynamic=True).min_tokens == 8192


def test_gradients_keep_a_site_dense() -> None:
    from models.capture import Backend

    torch._dynamo.reset()
    backend = Backend()
    torch.compile(self_attention(), backend=backend)(video().requires_grad_())
    torch._dynamo.reset()
    assert [site.verdict.reason for site in backend.sites] == [Reason.GRAD]


def test_no_guards_are_installed() -> None:
    graph = captured(self_attention(), video(), dynamic=True)
    site = graph.sites[0]
    assert isinstance(site.q_len, str)
    query = next(node for node in graph.graph.nodes if node is site.node).args[0]
    env = query.meta["example_value"].shape[2].node.shape_env
    before = len(env.guards)
    from models.capture import Knobs

    from svg_ear_compile.passes.classify import classify

    classify(graph.gm, Knobs(), graph.example_inputs)
    assert len(env.guards) == before


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [
        ("blocks.7.attn1", "blocks.*.attn1", True),
        ("blocks.7.attn1", "*attn1", True),
        ("blocks.7.attn1", "attn1", False),
        ("blocks.7.attn1", "blocks.?.attn2", False),
        ("blocks.17.attn1", "blocks.?.attn1", False),
        ("attn1", "blocks.*.attn1", True),  # the graph of one block
        ("attn2", "blocks.*.attn1", False),
        ("", "*", True),
    ],
)
def test_patterns_of_sites(path: str, pattern: str, matches: bool) -> None:
    assert named(path, (pattern,)) is matches


class Scaled(nn.Module):
    """Self attention with a scale of its own. head_dim is half the channels, so it may be a symbol too."""

    def __init__(self, scale: Callable[[Tensor], float] | float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, clip: Tensor) -> Tensor:
        x = heads(tokens(clip))
        scale = self.scale(x) if callable(self.scale) else self.scale
        return F.scaled_dot_product_attention(x, x, x, scale=scale)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "scale",
    [
        0.5,
        lambda x: x.shape[-1] ** -0.5,
        lambda x: 1 / math.sqrt(x.size(-1)),
        lambda x: 1 / x.shape[-1] ** 0.5,
    ],
    ids=["attribute", "power", "sqrt", "inverse"],
)
def test_scales_that_no_run_changes(scale: Any, dynamic: bool | None) -> None:
    graph = captured(Scaled(scale), video(), dynamic=dynamic)
    assert graph.sites[0].verdict.rewrite, str(graph.sites[0].verdict)
    (op,) = (n for n in rewrite(graph.gm, graph.sites, Knobs()).nodes if "svg_ear.attention" in str(n.target))
    assert SiteConstants(*op.args[4:]).scale == (0.5 if scale == 0.5 else None if dynamic else 0.25)


def test_a_scale_that_changes_with_the_length() -> None:
    model = Scaled(lambda x: 1 / math.sqrt(x.shape[-2]))
    assert site_of(model, video()).verdict.rewrite, "one length, one scale"
    assert site_of(model, video(), dynamic=True).verdict.reason is Reason.SCALE


def test_every_reason_is_a_sentence() -> None:
    for reason in Reason:
        assert reason.sentence
        assert not reason.sentence.endswith(".")
        assert isinstance(reason.hint, str)
