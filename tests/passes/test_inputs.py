"""The host finds rotary tables and what masks are made from, wherever SymInts push them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Backend, Captured, Knobs, capture, fresh_dynamo
from models.graphs import captured, heads, tokens, video
from models.tiny import build
from torch import Tensor

from svg_ear_compile.passes.inputs import mask_arguments


def rotary(graph: Captured) -> list[str]:
    return [graph.placeholders[i] for i in graph.inputs.rotary]


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "regional", "names"),
    [
        pytest.param(
            "cogvideox",
            False,
            ["l_kwargs_image_rotary_emb_0_", "l_kwargs_image_rotary_emb_1_"],
            marks=pytest.mark.slow,
        ),
        ("wan", True, ["l_rotary_emb_0_", "l_rotary_emb_1_"]),
    ],
)
def test_rotary_tables(name: str, regional: bool, names: list[str], dynamic: bool | None) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(3, 4, 6), regional=regional, dynamic=dynamic)
    assert rotary(backend.captured[0]) == names


def test_rotary_tables_of_a_hooked_block() -> None:
    """Offloading wraps forward(*args): names are those of the wrapped forward."""
    from diffusers.hooks import apply_group_offloading

    model, arguments = build("hunyuan_video")
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    backend = Backend(Knobs())
    with fresh_dynamo():
        model.compile_repeated_blocks(backend=backend)
        model(**arguments(3, 4, 6))
    found = [rotary(graph) for graph in backend.captured if any(s.verdict.rewrite for s in graph.sites)]
    assert found == [["l_stack0_0_4_0_", "l_stack0_0_4_1_"]] * 2


def mask_arguments_of(graph: Captured) -> list[str] | None:
    """Names of what the first site's mask is made from."""
    mask = next(site.key_mask for site in graph.sites if site.verdict.rewrite)
    assert mask is not None
    found = mask_arguments(mask.node)
    return None if found is None else [graph.placeholders[i] for i in found]


@pytest.mark.parametrize(
    ("name", "regional", "argument", "dynamic"),
    [
        ("hunyuan_video", False, "l_kwargs_encoder_attention_mask_", None),
        pytest.param("hunyuan_video", True, "l_attention_mask_", True, marks=pytest.mark.slow),
        ("hunyuan_video15", True, "l_attention_mask_", None),
        pytest.param("motif_video", False, "l_encoder_attention_mask_", True, marks=pytest.mark.slow),
        pytest.param("allegro", False, "l_attention_mask_", None, marks=pytest.mark.slow),
    ],
)
def test_what_a_mask_is_made_from(name: str, regional: bool, argument: str, dynamic: bool | None) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(3, 4, 6), regional=regional, dynamic=dynamic)
    graph = next(graph for graph in backend.captured if any(site.verdict.rewrite for site in graph.sites))
    (found,) = mask_arguments_of(graph) or ()
    assert found.endswith(argument)


def over(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def f(clip: Tensor, padding: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(padding)[:, None, None])

    return f


def written(padding: Tensor) -> Tensor:
    shown = padding.clone()
    shown[:, 3:9] = False
    return shown


def written_by_a_view(padding: Tensor) -> Tensor:
    shown = padding.clone()
    shown.unsqueeze(0)[..., 0].logical_not_()
    return shown


def augmented(padding: Tensor) -> Tensor:
    shown = padding.clone()
    half = shown[:, :36]
    half &= False
    return shown


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (lambda m: m, ["l_padding_"]),
        (lambda m: m & (torch.arange(72) < 70), ["l_padding_"]),
        (lambda m: torch.arange(72)[None] < 70, []),
        (lambda m: m & (torch.rand(72) < 0.5), None),
        (written, None),
        (written_by_a_view, None),
        (augmented, None),
    ],
)
def test_masks_that_are_no_function_of_arguments(mask: Callable[[Tensor], Tensor], found: Any) -> None:
    graph = captured(over(mask), video(), torch.ones(1, 72, dtype=torch.bool))
    assert mask_arguments_of(graph) == found
