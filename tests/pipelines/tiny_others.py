"""More tiny pipelines: two of video with sound, one of images. Text comes as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from models.tiny import build
from models.tiny_parts import noise
from pipelines.tiny import CHANNELS, TEXT, WIDTH, Tiny


def ltx2() -> Tiny:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), down_block_types=("LTX2VideoDownBlock3D",), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        latent_channels=2,
        resolution=32,
        mel_bins=8,
        double_z=True,
    )
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=1, connector_rope_base_seq_len=32,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in heads.items()},
    )  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, patch_size=1, patch_size_t=1, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2,
        caption_channels=WIDTH,
    )  # fmt: skip
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, audio_vae=audio_vae, text_encoder=None, tokenizer=None,
        connectors=connectors, transformer=transformer, vocoder=None,
    )  # fmt: skip
    shown = torch.ones(1, TEXT, dtype=torch.long)
    call: dict[str, Any] = {
        "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0,
        "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "output_type": "latent",
    }  # fmt: skip
    for prefix in ("", "negative_"):
        call |= {f"{prefix}prompt_embeds": noise(1, TEXT, WIDTH), f"{prefix}prompt_attention_mask": shown}
    return Tiny(pipe, call)


def flux() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from models.tiny import BUILDERS

    (build,) = (builder for builder in BUILDERS if builder.__name__ == "flux")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=build()[0], **parts)
    call = {
        "prompt_embeds": noise(1, TEXT, 16),
        "pooled_prompt_embeds": noise(1, 8),
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, {**call, "output_type": "latent"})


def minimax_h3() -> Tiny:
    """The blocks of its modular pipeline after the encoders, with a keyframe at each end: 37 frames of 2 x 3 tokens."""
    from diffusers import MiniMaxH3Scheduler
    from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3 as blocks

    pipe = blocks.MiniMaxH3FL2VACoreDenoiseStep().init_pipeline()
    schedulers = {
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
    }
    pipe.update_components(transformer=build("minimax_h3")[0], **schedulers)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": noise(1, TEXT, WIDTH), "text_token_tags": torch.ones(TEXT),
        "condition_latents": [noise(1, 24, 1, 4, 6) for _ in range(2)], "keyframe_anchors": ("first", "last"),
        "num_frames": 124, "height": 64, "width": 96, "output": "latents",
    }  # fmt: skip
    return Tiny(pipe, call)
