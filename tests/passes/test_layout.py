"""Text is found first or last, fixed or symbolic, and the grid wherever some reshape made the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models.graphs import captured, heads, tokens, video
from torch import Tensor

from svg_ear_compile.passes.site import Site

TEXT = torch.randn(1, 5, 32)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x))


def site_of(function: Callable[..., Tensor], *args: Tensor, dynamic: bool | None = None) -> Site:
    (site,) = captured(function, *args, dynamic=dynamic).sites
    return site


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("text_first", [True, False])
def test_text_first_or_last(text_first: bool, dynamic: bool | None) -> None:
    def f(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        parts = [tokens(hidden_states), encoder_hidden_states]
        return attend(torch.cat(parts[::-1] if text_first else parts, dim=1))

    site = site_of(f, video(), TEXT, dynamic=dynamic)
    assert site.kind == "joint"
    assert (site.layout.text_hint, site.layout.text_first) == (5, text_first)
    assert site.layout.grid_hint == (3, 4, 6)
    assert isinstance(site.layout.num_text, int) is (dynamic is None)


def test_text_is_the_input_named_like_text_even_if_longer() -> None:
    def f(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return attend(torch.cat([hidden_states, encoder_hidden_states], dim=1))

    layout = site_of(f, torch.randn(1, 8, 32), torch.randn(1, 20, 32)).layout
    assert (layout.text_hint, layout.text_first) == (20, False)


def test_without_names_the_longer_input_is_video() -> None:
    layout = site_of(
        lambda a, b: attend(torch.cat([a, b], 1)), torch.randn(1, 6, 32), torch.randn(1, 30, 32)
    ).layout
    assert (layout.text_hint, layout.text_first) == (6, True)


def test_several_kinds_of_text() -> None:
    def f(hidden_states: Tensor, image_embeds: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return attend(torch.cat([tokens(hidden_states), image_embeds, encoder_hidden_states], dim=1))

    layout = site_of(f, video(), torch.randn(1, 3, 32), TEXT).layout
    assert (layout.text_hint, layout.text_first) == (8, False)
    assert layout.text_source == "image_embeds last, encoder_hidden_states last"


def test_text_on_both_sides_stays_dense() -> None:
    def f(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return attend(torch.cat([encoder_hidden_states, tokens(hidden_states), encoder_hidden_states], dim=1))

    assert site_of(f, video(), TEXT).verdict.reason.name == "SPLIT_TEXT"


def test_several_videos_have_no_common_grid() -> None:
    def f(hidden_states: Tensor, history: Tensor) -> Tensor:
        return attend(torch.cat([tokens(history), tokens(hidden_states)], dim=1))

    site = site_of(f, video(), video(frames=2))
    assert site.verdict.rewrite
    assert (site.layout.text_hint, site.layout.grid) == (0, None)


def test_a_cut_video_has_no_grid() -> None:
    site = site_of(lambda hidden_states: attend(tokens(hidden_states)[:, 7:]), video())
    assert (site.q_hint, site.layout.grid) == (65, None)


def test_a_grid_from_a_position_table() -> None:
    def f(hidden_states: Tensor) -> Tensor:
        place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (3, 4, 6)), indexing="ij"))
        table = place.reshape(3, -1).float().sum(0)[None, :, None].cos()
        return attend(hidden_states * table)

    assert site_of(f, torch.randn(1, 72, 32)).layout.grid_hint == (3, 4, 6)


def test_frames_after_space_are_no_grid() -> None:
    site = site_of(lambda clip: attend(clip.permute(0, 3, 4, 2, 1).flatten(1, 3)), video())
    assert site.layout.grid is None
