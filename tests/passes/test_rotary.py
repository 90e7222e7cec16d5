"""Grids are read off the rotary tables that diffusers really makes; text and images pass for no video."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svg_ear_compile.passes.rotary import grid_from_rotary, is_sequence

GRIDS = [(3, 4, 6), (5, 4, 4), (2, 8, 8), (1, 4, 6), (1, 6, 6), (4, 2, 9), (7, 3, 2), (21, 30, 52)]


def wan(f: int, h: int, w: int) -> tuple[Tensor, ...]:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    return WanRotaryPosEmbed(64, (1, 2, 2), 128)(torch.empty(1, 4, f, 2 * h, 2 * w))


def hunyuan(f: int, h: int, w: int) -> tuple[Tensor, ...]:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    return HunyuanVideoRotaryPosEmbed(2, 1, [16, 56, 56], 256.0)(torch.empty(1, 4, f, 2 * h, 2 * w))


def cogvideox(f: int, h: int, w: int) -> tuple[Tensor, ...]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return get_3d_rotary_pos_embed(64, ((0, 0), (h, w)), (h, w), f, device="cpu")


def ltx(f: int, h: int, w: int) -> tuple[Tensor, ...]:
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    rope = LTXVideoRotaryPosEmbed(64, base_num_frames=20, base_height=2048, base_width=2048)
    return rope(torch.empty(1, f * h * w, 64), f, h, w, (8 / 25, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("make", [wan, hunyuan, cogvideox, ltx])
def test_tables_of_video_models(
    make: Callable[..., tuple[Tensor, ...]], grid: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tables = [table.to(dtype) for table in make(*grid)]
    f, h, w = grid
    assert grid_from_rotary(tables, f * h * w) == grid
    assert not is_sequence(tables, f * h * w)


def test_other_tables_are_ignored() -> None:
    tables = [*wan(3, 4, 6), torch.randn(7, 64), torch.arange(72), torch.randn(72)]
    assert grid_from_rotary(tables, 72) == (3, 4, 6)
    assert grid_from_rotary(tables, 73) is None
    assert grid_from_rotary([], 72) is None


def test_complex_tables() -> None:
    cos, sin = wan(3, 4, 6)
    assert grid_from_rotary([torch.complex(cos, sin)], 72) == (3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [8, 72, 1000])
def test_text_is_a_sequence(length: int, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=1))
    tables = rope(torch.empty(1, length, 64, dtype=dtype), torch.arange(length)[None])
    assert grid_from_rotary(tables, length) is None
    assert is_sequence(tables, length)


def test_an_image_has_one_frame() -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    place = torch.cartesian_prod(*(torch.arange(n) for n in (1, 8, 12)))
    image = FluxPosEmbed(10_000, [16, 56, 56])(place.float())
    assert grid_from_rotary(image, 96) == (1, 8, 12)
    joint = FluxPosEmbed(10_000, [16, 56, 56])(torch.cat([torch.zeros(5, 3), place.float()]))
    assert grid_from_rotary(joint, 101) is None


def test_positions_in_another_order_are_no_grid() -> None:
    shuffle = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    assert grid_from_rotary([table[:, shuffle] for table in wan(3, 4, 6)], 72) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [2, 3, 5, 8])
@pytest.mark.parametrize("make", [wan, hunyuan, ltx])
def test_a_rank_with_more_than_a_frame_finds_the_grid_of_all(
    make: Callable[..., tuple[Tensor, ...]], shards: int, dtype: torch.dtype
) -> None:
    grid = (9, 16, 15)  # 2160 tokens: 4.5, 3, 1.8 and 1.125 frames for a rank
    for shard in range(shards):
        tables = [x.to(dtype) for x in make(*grid)]
        dim = next(d for d, n in enumerate(tables[0].shape) if n == 2160)
        shares = [x.chunk(shards, dim)[shard] for x in tables]
        assert grid_from_rotary(shares, 2160, shards, shard) == grid
        assert grid_from_rotary(tables, 2160, shards, shard) == grid, "tables that are not shared"


def test_a_rank_with_less_than_a_frame_finds_none() -> None:
    tables = [x.chunk(12, 1)[5] for x in wan(9, 16, 15)]
    assert grid_from_rotary(tables, 2160, 12, 5) is None


def test_a_share_that_is_not_a_stretch_of_the_video_finds_none() -> None:
    """As where each rank gets the first and the last of its stretches."""
    tables = [torch.cat([x.chunk(8, 1)[1], x.chunk(8, 1)[6]], 1) for x in wan(9, 16, 15)]
    assert grid_from_rotary(tables, 2160, 4, 1) is None
