"""What the tiny configurations of several model families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]
Tiny = tuple[nn.Module, Callable[..., Arguments]]
"""(model, arguments(frames, height, width[, batch]) of one call, for a video of so many tokens)"""
TEXT = 7


def noise(*size: int) -> Tensor:
    return torch.randn(*size)


def wan_config() -> Arguments:
    return {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip


def wan_arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
    return {
        "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, TEXT, 16),
    }


def hunyuan_config() -> Arguments:
    return {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), "guidance_embeds": True,
    }  # fmt: skip


def hunyuan_arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
    return {
        "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "encoder_attention_mask": torch.arange(TEXT).expand(batch, TEXT) < 5,
        "pooled_projections": noise(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def cogvideox_config() -> dict[str, Any]:
    return {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 16, "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 16,
        "sample_frames": 9, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
    }  # fmt: skip


def cogvideox_arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return {
        "hidden_states": noise(batch, f, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, TEXT, 16),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (h, w)), (h, w), f, device="cpu"),
    }
