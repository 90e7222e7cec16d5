"""The models that `train.py` can train: how each one is built, called and loaded.

    wan        text by cross attention, heads of 128: the model of `svg-ear demo`
    hunyuan    joint text and video attention with a mask (padded text tokens), heads of 128
    cogvideox  joint text and video attention, heads of 64

All work on pixels in patches of 1 x 4 x 4 and read the caption ids of `svg_ear_compile.tiny_wan`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from svg_ear_compile import tiny_wan
from svg_ear_compile.tiny_wan import CAPTION_LENGTH, NONE, TEXT_DIM, embed

PATCH = 4
COG_HEAD_DIM = 64


def hunyuan_velocity(model: nn.Module, clip: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
    """As `tiny_wan.velocity`. Words of an object that is not there are padding; the pooled text is a mean."""
    dtype = model.proj_out.weight.dtype
    text = embed(ids).to(dtype)
    mask = (ids != NONE).int()
    out = model(clip.to(dtype), timestep, text, mask, text.mean(1), return_dict=False)
    return out[0].float()


@functools.lru_cache(maxsize=8)
def _rotary(frames: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return get_3d_rotary_pos_embed(
        COG_HEAD_DIM, ((0, 0), (rows, columns)), (rows, columns), frames, device=device
    )


def cogvideox_velocity(model: nn.Module, clip: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
    """As `tiny_wan.velocity`; the model itself wants frames before channels."""
    dtype = model.proj_out.weight.dtype
    frames, height, width = clip.shape[2:]
    rotary = _rotary(frames, height // PATCH, width // PATCH, clip.device)
    out = model(
        clip.to(dtype).transpose(1, 2), embed(ids).to(dtype), timestep, image_rotary_emb=rotary,
        return_dict=False,
    )  # fmt: skip
    return out[0].transpose(1, 2).float()


def compile_blocks(model: nn.Module, **how: Any) -> None:
    """Regional compilation; diffusers' `compile_repeated_blocks` does not know the blocks of CogVideoX."""
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in ("blocks", "transformer_blocks", "single_transformer_blocks"):
            module.compile(**how)


@dataclass(frozen=True)
class Kind:
    """One model: its diffusers class and configuration, what `--toy` changes, and how it is called.

    masked: its self attention has a mask.
    """

    class_name: str
    config: dict[str, Any]
    toy: dict[str, Any]
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    masked: bool = False

    def build(self, toy: bool = False) -> nn.Module:
        """A fresh model whose output and modulation start at zero."""
        model = getattr(diffusers, self.class_name)(**{**self.config, **(self.toy if toy else {})})
        for name, module in model.named_modules():
            modulation = ".norm" in name and name.endswith(".linear")
            if isinstance(module, nn.Linear) and (modulation or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        return model

    def load(
        self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """The trained model of an export folder, in eval mode."""
        model = getattr(diffusers, self.class_name).from_pretrained(folder, torch_dtype=dtype)
        return model.to(device).eval().requires_grad_(False)


SMALL = {"num_layers": 1}
KINDS = {
    "wan": Kind(
        "WanTransformer3DModel",
        {
            "patch_size": (1, PATCH, PATCH), "num_attention_heads": 2, "attention_head_dim": 128,
            "in_channels": 3, "out_channels": 3, "text_dim": TEXT_DIM, "freq_dim": 256, "num_layers": 8,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 128,
            "ffn_dim": 1024,
        },
        SMALL,
        tiny_wan.velocity,
    ),
    "hunyuan": Kind(
        "HunyuanVideoTransformer3DModel",
        {
            "patch_size": PATCH, "patch_size_t": 1, "num_attention_heads": 2, "attention_head_dim": 128,
            "in_channels": 3, "out_channels": 3, "text_embed_dim": TEXT_DIM,
            "pooled_projection_dim": TEXT_DIM,
            "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1, "guidance_embeds": False,
            "rope_axes_dim": (16, 56, 56),
        },
        {"num_single_layers": 1, **SMALL},
        hunyuan_velocity,
        masked=True,
    ),
    "cogvideox": Kind(
        "CogVideoXTransformer3DModel",
        {
            "patch_size": PATCH, "num_attention_heads": 4, "attention_head_dim": COG_HEAD_DIM,
            "in_channels": 3, "out_channels": 3, "text_embed_dim": TEXT_DIM, "time_embed_dim": 128,
            "num_layers": 6,
            "temporal_compression_ratio": 1, "max_text_seq_length": CAPTION_LENGTH, "sample_frames": 16,
            "sample_width": 32, "sample_height": 32, "use_rotary_positional_embeddings": True,
        },
        SMALL,
        cogvideox_velocity,
    ),
}  # fmt: skip
