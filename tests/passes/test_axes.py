"""Dimensions are followed through everything that models do with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models.graphs import captured, tokens, video
from torch import Tensor

from svg_ear_compile.passes.provenance.axes import Axis, part_size
from svg_ear_compile.passes.provenance.rules import trace_axes

X = torch.randn(2, 12, 8)


def axes_of(function: Callable[..., Tensor], *args: Tensor, dynamic: bool | None = None) -> tuple[Axis, ...]:
    """The axes of a function's result."""
    graph = captured(function, *args, dynamic=dynamic).graph
    return trace_axes(graph).of[graph.output_node().args[0][0]]  # type: ignore[index]


def words(axis: Axis) -> str:
    """`x.1` for dimension 1 of input x, products with *, joined parts with +, lost dimensions with ?."""

    def word(part: tuple) -> str:
        return "*".join(
            "?" if a.guess else f"{a.root.name[2:-1]}.{a.root_dim}" if a.root is not None else str(a.size)
            for a in part
        )

    return " + ".join(word(part) for part in axis)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (8,)) * 2 + x,
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x.permute(2, 1, 0).movedim(0, 2).transpose(0, 1),
        lambda x: x.unflatten(1, (3, 4)).flatten(1, 2),
        lambda x: x.reshape(2, 3, 4, 8).view(2, 12, 8),
        lambda x: torch.cat([x[:, :5], x[:, 5:]], dim=1),
        lambda x: torch.cat(x.split([5, 7], dim=1), dim=1),
        lambda x: x.unsqueeze(1).squeeze(1).float().contiguous(),
        lambda x: x.chunk(2, dim=-1)[0],
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: x.unflatten(-1, (4, 2)).unbind(-1)[0],
        lambda x: x.unflatten(-1, (4, 2)).sum(-1),
        lambda x: F.linear(x, torch.ones(5, 8)),
        lambda x: x @ torch.ones(8, 5),
        lambda x: torch.ones(12, 8) * x,
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None, :7], x[:, None, :7])[:, 0],
    ],
)
def test_tokens_stay_the_same_tokens(function: Callable[..., Tensor]) -> None:
    assert words(axes_of(function, X)[1]) in ("x.1", "x.1*x.1")


def test_in_place_writes_are_seen() -> None:
    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2]
        return out

    def g(x: Tensor) -> Tensor:
        out = torch.zeros(2, 12, 8)
        out[:, :, 4:] = x[:, :, :4]
        return out

    assert words(axes_of(f, X)[1]) == "x.1"
    assert words(axes_of(g, X)[1]) == "x.1"


@pytest.mark.parametrize("dynamic", [None, True])
def test_patches_become_a_product(dynamic: bool | None) -> None:
    def conv(clip: Tensor, weight: Tensor) -> Tensor:
        return tokens(F.conv3d(clip, weight, stride=(1, 2, 2)))

    def reshaped(clip: Tensor) -> Tensor:
        b, c, f, h, w = clip.shape
        x = clip.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        return x.flatten(4).flatten(1, 3)

    def frame_by_frame(clip: Tensor, weight: Tensor) -> Tensor:
        b, c, f, h, w = clip.shape
        x = F.conv2d(clip.transpose(1, 2).reshape(b * f, c, h, w), weight, stride=2)
        return x.unflatten(0, (b, f)).permute(0, 1, 3, 4, 2).flatten(1, 3)

    clip = video(4, 3, 8, 12)
    for function, args in (
        (conv, (clip, torch.ones(5, 4, 1, 2, 2))),
        (reshaped, (clip,)),
        (frame_by_frame, (clip, torch.ones(5, 4, 2, 2))),
    ):
        (part,) = axes_of(function, *args, dynamic=dynamic)[1]
        assert words((part,)) == "clip.2*clip.3*clip.4"
        assert [atom.size for atom in part] == [3, 4, 6]


def test_text_and_video_are_parts() -> None:
    axis = axes_of(lambda t, x: torch.cat([t * 2, x], 1).relu(), torch.randn(2, 5, 8), X)[1]
    assert words(axis) == "t.1 + x.1"
    assert list(map(part_size, axis)) == [5, 12]
    assert words(axes_of(lambda t, x: torch.cat([t, x], 1)[:, 5:], torch.randn(2, 5, 8), X)[1]) == "x.1"


def test_a_piece_is_not_the_whole() -> None:
    whole = axes_of(lambda x: torch.cat([x[:, :4], x], 1), X)[1]
    assert list(map(part_size, whole)) == [4, 12]
    assert whole[0] != whole[1]


def test_two_convolutions_make_different_tokens() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return torch.cat([F.conv1d(y, w), F.conv1d(y, w)], 2).transpose(1, 2)

    first, second = axes_of(f, X, torch.ones(8, 8, 1))[1]
    assert first != second


def test_unknown_operations_are_guesses() -> None:
    assert words(axes_of(lambda x: torch.cumsum(x, 1), X)[1]) == "x.1"
    assert words(axes_of(lambda x: x.repeat(1, 2, 1), X)[1]) == "?"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, i: x[:, i],
        lambda x, i: x.index_select(1, i),
        lambda x, i: x.roll(2, 1),
        lambda x, i: x.flip(1),
    ],
)
def test_another_order_makes_other_tokens(function: Callable[..., Tensor]) -> None:
    graph = captured(lambda x, i: (x + 0, function(x, i), function(x * 2, i)), X, torch.randperm(12)).graph
    axes = trace_axes(graph)
    before, after, again = (axes.of[node][1] for node in graph.output_node().args[0])  # type: ignore[union-attr]
    assert before != after
    assert after == again, "but the same ones wherever the same is done"


def test_position_tables_are_aliases() -> None:
    graph = captured(lambda x, rope: x * rope, X, torch.randn(12, 8)).graph
    axes = trace_axes(graph)
    (axis,) = [axes.of[node][1] for node in graph.nodes if node.name == "l_x_"]
    assert [words(alias) for alias in axes.aliases[axis]] == ["rope.0"]
