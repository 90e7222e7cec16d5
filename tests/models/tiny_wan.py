"""Tiny configurations of Wan's descendants: control branches, animation, flow maps, history, editing."""

from __future__ import annotations

from typing import Any

import torch
from models.tiny_parts import Arguments, Tiny, noise, wan_arguments, wan_config


def wan_vace() -> Tiny:
    from diffusers import WanVACETransformer3DModel

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        control = {"control_hidden_states": noise(batch, 6, f, 2 * h, 2 * w)}
        return wan_arguments(f, h, w, batch) | control

    return WanVACETransformer3DModel(**wan_config(), vace_layers=[0], vace_in_channels=6), arguments


def wan_animate() -> Tiny:
    from diffusers import WanAnimateTransformer3DModel

    model = WanAnimateTransformer3DModel(
        **wan_config() | {"in_channels": 12}, latent_channels=4, image_dim=16, added_kv_proj_dim=64,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return wan_arguments(f, h, w, batch) | {
            "hidden_states": noise(batch, 12, f, 2 * h, 2 * w),
            "encoder_hidden_states": noise(batch, 512, 16),
            "encoder_hidden_states_image": noise(batch, 5, 16),
            "pose_hidden_states": noise(batch, 4, f - 1, 2 * h, 2 * w),
            "face_pixel_values": noise(batch, 3, 4 * (f - 1) - 3, 16, 16),
        }

    return model, arguments


def wan_animate_2() -> Tiny:
    from diffusers import WanAnimate2Transformer3DModel
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model = WanAnimate2Transformer3DModel(
        text_len=7, in_dim=8, dim=64, ffn_dim=64, freq_dim=32, text_dim=16, out_dim=4, num_heads=2,
        num_layers=2,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": [noise(4, f, 2 * h, 2 * w) for _ in range(batch)],
            "timestep": torch.full((batch,), 1.0),
            "encoder_hidden_states": [noise(7, 16) for _ in range(batch)],
            "condition_latents": [noise(4, f, 2 * h, 2 * w) for _ in range(batch)],
            "encoder_hidden_states_image": noise(batch, 4, 1280),
            "kv_cache": WanAnimate2KVCache(2),
            "kv_cache_mode": "extract",
            "seq_len": f * h * w,
            "offset_grid_sizes": torch.tensor([[f, h, w]] * batch),
        }

    return model, arguments


def chronoedit() -> Tiny:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**wan_config(), rope_temporal_skip_len=8), wan_arguments


def skyreels_v2_df() -> Tiny:
    """SkyReels V2 with diffusion forcing: attention is causal over blocks of frames."""
    from diffusers import SkyReelsV2Transformer3DModel

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        forcing = {"timestep": torch.full((batch, 2 * f), 500), "enable_diffusion_forcing": True}
        return wan_arguments(2 * f, h, w, batch) | forcing

    return SkyReelsV2Transformer3DModel(**wan_config(), num_frame_per_block=2), arguments


def anyflow_config() -> dict[str, Any]:
    return {key: value for key, value in wan_config().items() if key != "qk_norm"}


def anyflow_arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
    return wan_arguments(f, h, w, batch) | {
        "hidden_states": noise(batch, f, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch, f), 500.0),
        "r_timestep": torch.full((batch, f), 250.0),
    }


def anyflow() -> Tiny:
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(**anyflow_config()), anyflow_arguments


def anyflow_far() -> Tiny:
    from diffusers import AnyFlowFARTransformer3DModel

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return anyflow_arguments(f, h, w, batch) | {"chunk_partition": [1, f - 1]}

    return AnyFlowFARTransformer3DModel(**anyflow_config()), arguments


def helios() -> Tiny:
    """Past frames, coarser the older they are, come before the frames to be denoised."""
    from diffusers import HeliosTransformer3DModel

    config = {key: value for key, value in wan_config().items() if key != "rope_max_seq_len"}

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        history = {"short": 1, "mid": 2, "long": 4}
        past = {f"latents_history_{k}": noise(batch, 4, n, 2 * h, 2 * w) for k, n in history.items()}
        places = {f"indices_latents_history_{k}": torch.arange(n)[None] for k, n in history.items()}
        now = {"indices_hidden_states": torch.arange(f).expand(batch, f)}
        return wan_arguments(f, h, w, batch) | past | places | now

    return HeliosTransformer3DModel(**config, rope_dim=(12, 10, 10)), arguments


WAN_FAMILY = (
    wan_vace, wan_animate, wan_animate_2, chronoedit, skyreels_v2_df, anyflow, anyflow_far, helios,
)  # fmt: skip
