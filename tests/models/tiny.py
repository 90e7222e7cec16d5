"""Tiny configurations of real diffusers and transformers classes, with arguments for one call of each.

Two heads of 16 or 32, one or two layers, a few dozen tokens, seeded weights. `build(name)` gives the model
and a function that makes its arguments for a video size, so that one model can be called at several.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from models.tiny_others import OTHERS
from models.tiny_parts import (
    TEXT,
    Arguments,
    cogvideox_arguments,
    cogvideox_config,
    hunyuan_arguments,
    hunyuan_config,
    noise,
    wan_arguments,
    wan_config,
)
from models.tiny_wan import WAN_FAMILY
from torch import Tensor, nn


def wan() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**wan_config()), wan_arguments


def wan_i2v() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import WanTransformer3DModel

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        text = {
            "encoder_hidden_states": noise(batch, 512, 16),
            "encoder_hidden_states_image": noise(batch, 5, 16),
        }
        return wan_arguments(f, h, w, batch) | text

    return WanTransformer3DModel(**wan_config(), image_dim=16, added_kv_proj_dim=64), arguments


def cogvideox() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**cogvideox_config(), patch_size=2), cogvideox_arguments


def hunyuan_video() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**hunyuan_config()), hunyuan_arguments


def hunyuan_video15() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, h, w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "encoder_attention_mask": torch.arange(TEXT).expand(batch, TEXT) < 5,
            "encoder_hidden_states_2": noise(batch, 6, 8),
            "encoder_attention_mask_2": torch.arange(6).expand(batch, 6) < 4,
            "image_embeds": noise(batch, 3, 8),
        }

    return model, arguments


def ltx() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, f * h * w, 4),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500),
            "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "num_frames": f, "height": h, "width": w,
        }  # fmt: skip

    return model, arguments


def mochi() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500),
            "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        }

    return model, arguments


def allegro() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, sample_height=8,
        sample_width=8, sample_frames=4, caption_channels=16,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        freqs = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (h, w)), (h, w), f, device="cpu")
        grid = torch.cartesian_prod(*freqs[3:]).T.reshape(3, 1, -1).long()
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500),
            "attention_mask": torch.ones(batch, f, 2 * h, 2 * w),
            "encoder_attention_mask": torch.ones(batch, TEXT),
            "image_rotary_emb": (freqs[:3], tuple(grid)),
        }

    return model, arguments


def cosmos() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import CosmosTransformer3DModel

    model = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "attention_mask": torch.ones(batch, TEXT),
            "fps": 30,
        }

    return model, arguments


def kandinsky5() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, f, 2 * h, 2 * w, 4),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500.0),
            "pooled_projections": noise(batch, 8),
            "visual_rope_pos": (torch.arange(f), torch.arange(h), torch.arange(w)),
            "text_rope_pos": torch.arange(TEXT),
        }

    return model, arguments


def skyreels_v2() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**wan_config()), wan_arguments


def latte() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=32, sample_size=16, patch_size=2, num_embeds_ada_norm=1000, caption_channels=16,
        norm_type="ada_norm_single", norm_elementwise_affine=False, attention_bias=True, video_length=3,
        activation_fn="gelu-approximate",
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": noise(batch, TEXT, 16),
        }

    return model, arguments


def easyanimate() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import EasyAnimateTransformer3DModel

    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        sample_width=16, sample_height=16, num_layers=2, mmdit_layers=2, time_embed_dim=8, text_embed_dim=16,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": noise(batch, TEXT, 16),
        }

    return model, arguments


def motif_video() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import MotifVideoTransformer3DModel

    model = MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "encoder_attention_mask": torch.arange(TEXT).expand(batch, TEXT) < 5,
        }

    return model, arguments


def flux() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (1, h, w)), indexing="ij"), -1)
        return {
            "hidden_states": noise(batch, h * w, 4),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "pooled_projections": noise(batch, 8),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": place.reshape(-1, 3).float(),
            "txt_ids": torch.zeros(TEXT, 3),
        }

    return model, arguments


def image_vae() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, layers_per_block=1)

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {"sample": noise(batch, 3, h, w)}

    return model, arguments


def video_vae() -> tuple[nn.Module, Callable[..., Arguments]]:
    from diffusers import AutoencoderKLWan

    class Decoder(nn.Module):
        """The decoder alone: WanVAE's own forward keeps a cache of frames in Python lists."""

        def __init__(self) -> None:
            super().__init__()
            vae = AutoencoderKLWan(
                base_dim=16, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
            )
            self.attention = vae.decoder.mid_block

        def forward(self, sample: Tensor) -> Tensor:
            return self.attention(sample)

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {"sample": noise(batch, 32, f, h, w)}

    return Decoder(), arguments


def llama() -> tuple[nn.Module, Callable[..., Arguments]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {"input_ids": torch.randint(32, (batch, f * h * w)), "use_cache": False}

    return LlamaModel(config), arguments


def vit() -> tuple[nn.Module, Callable[..., Arguments]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=2,
    )

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {"pixel_values": noise(batch, 3, 16, 16)}

    return ViTModel(config, add_pooling_layer=False), arguments


BUILDERS = (
    wan, wan_i2v, cogvideox, hunyuan_video, hunyuan_video15, ltx, mochi, allegro, cosmos, kandinsky5,
    skyreels_v2, latte, easyanimate, motif_video, flux, image_vae, video_vae, llama, vit, *WAN_FAMILY,
    *OTHERS,
)  # fmt: skip


def build(name: str) -> tuple[nn.Module, Callable[..., Arguments]]:
    """(model in eval mode with seeded weights, arguments(frames, height, width[, batch]) in tokens)."""
    torch.manual_seed(0)
    builder = {b.__name__: b for b in BUILDERS}[name]
    model, arguments = builder()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():
                weight.normal_(std=0.1)  # a gate that begins at zero would hide all that attention does
    return model.eval(), arguments
