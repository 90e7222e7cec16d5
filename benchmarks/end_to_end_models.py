"""How is a pipeline of diffusers built at its published configuration, with random weights, and how called?

Text comes as random embeddings, latents are what leaves; only image to video has a VAE, for its image.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

PROMPT = 60
"""Tokens of the prompt; those after it are zero (Wan, CogVideoX) or masked (the others)."""
Noise = Callable[..., Tensor]
Clip = tuple[int, int, int]


class Model(NamedTuple):
    """size: width, height and frames in pixels. steps: of the published example; make: (pipeline, its arguments)."""

    transformer: str
    size: Clip
    steps: int
    make: Callable[[argparse.Namespace, Noise], tuple[Any, dict[str, Any]]]
    config: dict[str, Any]
    tiny: dict[str, Any]
    tiny_size: Clip = (256, 256, 9)


class Watched:
    """For pipelines without `callback_on_step_end`. at_end: called with the number of the step and the latents."""

    at_end: Callable[[int, Tensor], None] | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        number = self.step_index or 0
        stepped = super().step(*args, **kwargs)
        if self.at_end is not None:
            self.at_end(number, stepped[0])
        return stepped


class WatchedEuler(Watched, diffusers.FlowMatchEulerDiscreteScheduler):
    pass


class WatchedMiniMaxH3(Watched, diffusers.MiniMaxH3Scheduler):
    pass


def transformer(args: argparse.Namespace) -> Any:
    """With random weights, made where they run, in bfloat16 but for the modules that diffusers keeps in fp32."""
    model = MODELS[args.model]
    config = {**model.config, **(model.tiny if args.tiny else {})}
    layers = args.layers or (2 if args.tiny else None)
    if layers:
        config["num_layers"] = layers
    if args.model == "hunyuan":
        config["num_single_layers"] = 2 * config["num_layers"]
    return random(getattr(diffusers, model.transformer), config, args)


def random(kind: type[nn.Module], config: dict[str, Any], args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype(args))
    try:
        with torch.device(args.device):
            made = kind(**config).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(made, "_keep_in_fp32_modules", None) or ())
    for name, parameter in made.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return made


def dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def latent_size(args: argparse.Namespace, time: int, space: int) -> Clip:
    """Frames, height and width after a VAE that shrinks a clip so many times."""
    return (args.frames - 1) // time + 1, args.height // space, args.width // space


def text(told: dict[str, Any], noise: Noise, length: int, dim: int, zeros: bool = True) -> dict[str, Any]:
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        told[name] = noise(length, dim)
        if zeros:
            told[name][:, PROMPT:] = 0
    return told


def wan(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """Two calls a step for guidance. wan22: one transformer for the first steps, another for the rest. wan_i2v: the
    image comes as channels, as in Wan 2.2; of its two transformers one is run."""
    small = args.model == "wan5b"
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if args.height >= 700 else 3.0
    )
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "scheduler": scheduler}
    parts["transformer"] = model = transformer(args)
    told = text({"guidance_scale": 5.0}, noise, 512, model.config.text_dim)
    told["latents"] = noise(
        16 if args.model == "wan_i2v" else model.config.in_channels, *latent_size(args, 4, 16 if small else 8)
    )
    if args.model == "wan22":
        parts |= {"transformer_2": transformer(args), "boundary_ratio": 0.875}
    if args.model != "wan_i2v":
        return diffusers.WanPipeline(**parts, vae=None, expand_timesteps=small), told
    vae = random(diffusers.AutoencoderKLWan, {"base_dim": 4, "num_res_blocks": 1} if args.tiny else {}, args)
    told["image"] = noise(3, args.height, args.width).clamp(-1, 1)
    return diffusers.WanImageToVideoPipeline(**parts, vae=vae, image_encoder=None, image_processor=None), told


def hunyuan(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """One call a step: guidance is an input. The padding of the prompt is masked."""
    model = transformer(args)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    told = {
        "latents": noise(16, *latent_size(args, 4, 8)), "prompt_embeds": noise(256, model.config.text_embed_dim),
        "pooled_prompt_embeds": noise(model.config.pooled_projection_dim),
        "prompt_attention_mask": (torch.arange(256, device=args.device) < PROMPT)[None],
    }  # fmt: skip
    return diffusers.HunyuanVideoPipeline(**parts, transformer=model, scheduler=scheduler), told


def hunyuan15(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """Two calls a step. Nothing is drawn by glyphs: the second text is masked throughout."""
    model = transformer(args)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))
    told: dict[str, Any] = {"latents": noise(32, *latent_size(args, 4, 16))}
    lengths = {"": (1000, model.config.text_embed_dim, PROMPT), "_2": (256, model.config.text_embed_2_dim, 0)}
    for prefix in ("", "negative_"):
        for suffix, (length, dim, shown) in lengths.items():
            told[f"{prefix}prompt_embeds{suffix}"] = noise(length, dim)
            shown_rows = (torch.arange(length, device=args.device) < shown)[None]
            told[f"{prefix}prompt_embeds_mask{suffix}"] = shown_rows.to(dtype(args))
    # Only its compression and its channels are asked for.
    vae = diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(8,) * 5, layers_per_block=1).to(
        args.device
    )
    return diffusers.HunyuanVideo15Pipeline(
        **parts, vae=vae, transformer=model, scheduler=WatchedEuler(shift=7.0), guider=guider
    ), told


def cogvideox(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """One call a step, with both halves of the guidance in one batch."""
    model = transformer(args)
    frames, height, width = latent_size(args, 4, 8)
    told = text({"guidance_scale": 6.0}, noise, 226, model.config.text_embed_dim)
    told["latents"] = noise(frames, model.config.in_channels, height, width).to(dtype(args))
    told |= {name: told[name].to(dtype(args)) for name in ("prompt_embeds", "negative_prompt_embeds")}
    scheduler = diffusers.CogVideoXDDIMScheduler(  # not the stochastic one, so that outputs can be compared
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
    ), told


def ltx2(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """Video with sound; one call a step, both halves of the guidance in one batch, no other guidance."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    model = transformer(args)
    width = model.config.caption_channels
    heads = {"num_attention_heads": 2, "attention_head_dim": width // 2, "num_layers": 1}
    config = {f"{kind}_connector_{name}": x for kind in ("video", "audio") for name, x in heads.items()}
    connectors = random(
        LTX2TextConnectors, {"caption_channels": width, "text_proj_in_factor": 1, **config}, args
    )
    told: dict[str, Any] = {
        "guidance_scale": 4.0, "stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "latents": noise(math.prod(latent_size(args, 8, 32)), model.config.in_channels),
        "audio_latents": noise(round(args.frames / 24 * 25), 128),
    }  # fmt: skip
    for prefix in ("", "negative_"):
        told[f"{prefix}prompt_embeds"] = noise(256, width).to(dtype(args))
        shown = torch.arange(256, device=args.device) >= 256 - PROMPT  # padded on the left
        told[f"{prefix}prompt_attention_mask"] = shown[None].long()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    # Of the VAEs only their compression and their statistics are asked for.
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=model.config.in_channels, block_out_channels=(8, 16, 32, 32),
        decoder_block_out_channels=(8, 16, 32), spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    parts: dict[str, Any] = {"vae": vae.to(args.device)}
    parts["audio_vae"] = diffusers.AutoencoderKLLTX2Audio(ch_mult=(1, 1, 1), num_res_blocks=1).to(args.device)
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "vocoder"))
    return diffusers.LTX2Pipeline(
        **parts, connectors=connectors, transformer=model, scheduler=scheduler
    ), told


def minimax_h3(args: argparse.Namespace, noise: Noise) -> tuple[Any, dict[str, Any]]:
    """The blocks of its modular pipeline between the encoders and the decoders: text, stereo sound and video in one
    packed sequence, one call a step. Its schedule counts the end as a step."""
    from diffusers.modular_pipelines.minimax_h3 import modular_pipeline
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

    pipe, model = MiniMaxH3CoreDenoiseStep().init_pipeline(), transformer(args)
    pipe.update_components(
        transformer=model,
        scheduler=WatchedMiniMaxH3(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    frames = modular_pipeline.video_latent_num_frames(args.frames, 17, 5)
    text, sound = 300, modular_pipeline.audio_latent_num_frames(args.frames)
    return pipe, {
        "prompt_embeds": noise(text, model.config.text_dim).to(dtype(args)), "text_token_tags": torch.ones(text),
        "latents": noise(24, frames, args.height // 16, args.width // 16),
        "audio_latents": noise(2, 32, sound)[0], "num_inference_steps": args.steps + 1, "output": "latents",
    }  # fmt: skip


_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
}
_WAN = "WanTransformer3DModel"
_HD, _SD = (1280, 720, 81), (832, 480, 81)
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = {
    "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48
}  # fmt: skip
_I2V = {"in_channels": 36, "num_layers": 40}
_TINY_HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_refiner_layers": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_TINY_HUNYUAN15 = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_refiner_layers": 1, "text_embed_dim": 16,
    "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_COGVIDEOX = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_TINY_COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16, "time_embed_dim": 8,
    "sample_width": 32, "sample_height": 32, "sample_frames": 9,
}  # fmt: skip
_TINY_LTX2 = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "cross_attention_dim": 32, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32, "caption_channels": 16, "audio_in_channels": 128,
}  # fmt: skip
_TINY_MINIMAX_H3 = {
    "num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 32, "ffn_dim": 64, "text_dim": 16,
    "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 4, "num_refiner_layers": 1,
}  # fmt: skip
MODELS = {
    "wan14b": Model(_WAN, _HD, 50, wan, {"num_layers": 40}, _TINY_WAN),
    "wan14b_480p": Model(_WAN, _SD, 50, wan, {"num_layers": 40}, _TINY_WAN),
    "wan_i2v": Model(_WAN, _SD, 50, wan, _I2V, _TINY_WAN),
    "wan22": Model(_WAN, _SD, 40, wan, {"num_layers": 40}, _TINY_WAN),
    "wan1b": Model(_WAN, _SD, 50, wan, _WAN_1B, _TINY_WAN),
    "wan5b": Model(_WAN, (1280, 704, 121), 50, wan, _WAN_5B, _TINY_WAN),
    "hunyuan": Model(
        "HunyuanVideoTransformer3DModel", (1280, 720, 129), 50, hunyuan, {"num_layers": 20}, _TINY_HUNYUAN
    ),
    "hunyuan15": Model(
        "HunyuanVideo15Transformer3DModel", (1280, 720, 121), 50, hunyuan15,
        {"num_layers": 54, "task_type": "t2v", "target_size": 960}, _TINY_HUNYUAN15,
    ),
    "cogvideox": Model(
        "CogVideoXTransformer3DModel", (720, 480, 49), 50, cogvideox, _COGVIDEOX, _TINY_COGVIDEOX
    ),
    "ltx2": Model("LTX2VideoTransformer3DModel", (1536, 1024, 121), 40, ltx2, {"num_layers": 48}, _TINY_LTX2),
    "minimax_h3": Model(
        "MiniMaxH3Transformer3DModel", (1344, 768, 124), 50, minimax_h3, {"num_layers": 50}, _TINY_MINIMAX_H3,
        (96, 64, 124),
    ),
}  # fmt: skip
"""What a configuration does not name has its published value by default."""


def build(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline and what it is called with."""
    generator = torch.Generator(args.device).manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, device=args.device, generator=generator)

    pipe, own = MODELS[args.model].make(args, noise)
    told = {"width": args.width, "height": args.height, "num_frames": args.frames}
    told |= {"num_inference_steps": args.steps, **own}
    if "output" not in told:  # what a modular pipeline has instead
        told["output_type"] = "latent"
    pipe.set_progress_bar_config(mininterval=5)
    return pipe, told


def start_of(told: dict[str, Any], args: argparse.Namespace) -> Tensor:
    """The latents before the first step, as the scheduler has them."""
    if args.model != "minimax_h3":
        return told["latents"]
    from diffusers.modular_pipelines.minimax_h3.before_denoise import patchify_video_latents

    return patchify_video_latents(told["latents"], (1, 2, 2))
