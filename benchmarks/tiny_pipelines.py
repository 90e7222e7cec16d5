"""How does a real diffusers pipeline sample a trained tiny model?

WanPipeline and HunyuanVideoPipeline call the transformer twice a step for guidance, CogVideoXPipeline once,
with both halves in one batch. Text encoders and VAEs are left out: captions come as embeddings, clips leave
as latents, which are the pixels here. Noise levels are moved up by `tiny_wan.noise_shift`, as in training.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from svg_ear_compile import tiny_wan
from svg_ear_compile.tiny_wan import CAPTION_LENGTH, NONE, NULL, embed

Size = tuple[int, int, int]  # frames, height, width in pixels
COMPRESSION = 8
"""What a pipeline without a VAE takes its VAE to shrink heights and widths by."""


class Flow(diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler steps of a flow, with the two members that CogVideoXPipeline asks of a scheduler besides."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def pipeline(model: str, network: nn.Module, size: Size) -> diffusers.DiffusionPipeline:
    """model: a name of `kinds.KINDS`, which `network` is of."""
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": network}
    parts["scheduler"] = Flow(shift=tiny_wan.noise_shift(*size))
    if model == "wan":
        pipe = diffusers.WanPipeline(**parts)
    elif model == "hunyuan":
        pipe = diffusers.HunyuanVideoPipeline(**parts, tokenizer_2=None, text_encoder_2=None)
    else:
        # Positions are those of the clip's own size; latents and embeddings stay fp32 between the steps.
        network.register_to_config(sample_height=size[1], sample_width=size[2])
        network.register_forward_pre_hook(_in_its_dtype, with_kwargs=True)
        pipe = diffusers.CogVideoXPipeline(**parts)
    pipe.set_progress_bar_config(disable=None)
    return pipe


def _in_its_dtype(network: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    states = {name: kwargs[name].to(network.dtype) for name in kwargs if name.endswith("hidden_states")}
    return args, {**kwargs, **states}


def generate(
    model: str, pipe: diffusers.DiffusionPipeline, noise: Tensor, ids: Tensor, steps: int, guidance: float
) -> Tensor:
    """Clips [B,3,F,H,W] fp32 in [0, 1].

    noise: [B,3,F,H,W] standard normal; ids: [B,CAPTION_LENGTH]; guidance: 1 for none.
    """
    _, _, frames, height, width = noise.shape
    empty = torch.full_like(ids, NULL)
    told: dict[str, Any] = {
        "prompt_embeds": embed(ids), "negative_prompt_embeds": embed(empty), "latents": noise.float(),
        "height": height * COMPRESSION, "width": width * COMPRESSION, "num_frames": frames * 4 - 3,
        "num_inference_steps": steps, "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    if model == "hunyuan":
        told["true_cfg_scale"] = guidance
        for prefix, caption in (("", ids), ("negative_", empty)):
            told[f"{prefix}pooled_prompt_embeds"] = embed(caption).mean(1)
            told[f"{prefix}prompt_attention_mask"] = (caption != NONE).int()
    else:
        told["guidance_scale"] = guidance
    if model == "cogvideox":
        told["latents"] = noise.float().transpose(1, 2)
        told["max_sequence_length"] = CAPTION_LENGTH
    with torch.no_grad():
        clip: Tensor = pipe(**told)[0]
    clip = clip.transpose(1, 2) if model == "cogvideox" else clip
    return (clip / 2 + 0.5).clamp(0, 1)
