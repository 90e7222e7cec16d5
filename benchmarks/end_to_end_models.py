"""How is a pipeline of diffusers built at its published configuration, with random weights, and how called?"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import HunyuanVideoTransformer3DModel, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

PROMPT = 60
"""Tokens of the prompt; those after it are zero (Wan) or masked (HunyuanVideo)."""


class Model(NamedTuple):
    """size: width, height and frames in pixels. flow_shift: as recommended for that size."""

    transformer: type[Any]
    size: tuple[int, int, int]
    flow_shift: float
    config: dict[str, Any]
    tiny: dict[str, Any]


_TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
}
_TINY_HUNYUAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_refiner_layers": 1, "text_embed_dim": 16,
    "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
MODELS = {
    "wan14b": Model(WanTransformer3DModel, (1280, 720, 81), 5.0, {"num_layers": 40}, _TINY_WAN),
    "wan1b": Model(WanTransformer3DModel, (832, 480, 81), 3.0, _WAN_1B, _TINY_WAN),
    "hunyuan": Model(
        HunyuanVideoTransformer3DModel, (1280, 720, 129), 7.0, {"num_layers": 20}, _TINY_HUNYUAN
    ),
}
"""What a configuration does not name has its published value by default."""
TINY_SIZE = (256, 256, 9)


def build_transformer(args: argparse.Namespace) -> Any:
    """With random weights, made where they run."""
    model = MODELS[args.model]
    config = {**model.config, **(model.tiny if args.tiny else {})}
    layers = args.layers or (2 if args.tiny else None)
    if layers:
        config["num_layers"] = layers
    if args.model == "hunyuan":
        config["num_single_layers"] = 2 * config["num_layers"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if args.device == "cpu" else torch.bfloat16)
    try:
        with torch.device(args.device):
            transformer = model.transformer(**config).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer


def build(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline and what it is called with. Wan has two calls a step for guidance; HunyuanVideo has one."""
    shift, transformer = MODELS[args.model].flow_shift, build_transformer(args)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": transformer}
    random = torch.Generator(args.device).manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, device=args.device, generator=random)

    width, height, frames = args.width, args.height, args.frames
    told: dict[str, Any] = {
        "width": width, "height": height, "num_frames": frames, "num_inference_steps": args.steps,
        "latents": noise(16, (frames - 1) // 4 + 1, height // 8, width // 8), "output_type": "latent",
    }  # fmt: skip
    if args.model == "hunyuan":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        pipe = diffusers.HunyuanVideoPipeline(
            **parts, scheduler=scheduler, tokenizer_2=None, text_encoder_2=None
        )
        told["prompt_embeds"] = noise(256, transformer.config.text_embed_dim)
        told["pooled_prompt_embeds"] = noise(transformer.config.pooled_projection_dim)
        told["prompt_attention_mask"] = (torch.arange(256, device=args.device) < PROMPT)[None]
    else:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        pipe = diffusers.WanPipeline(**parts, scheduler=scheduler)
        told["guidance_scale"] = 5.0
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            told[name] = noise(512, transformer.config.text_dim)
            told[name][:, PROMPT:] = 0
    pipe.set_progress_bar_config(mininterval=5)
    return pipe, told
