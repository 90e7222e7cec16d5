"""Tiny configurations of HunyuanVideo's relatives, models with sound, and those that are no plain DiT."""

from __future__ import annotations

import torch
from models.tiny_parts import (
    TEXT,
    Arguments,
    Tiny,
    cogvideox_arguments,
    cogvideox_config,
    hunyuan_arguments,
    hunyuan_config,
    noise,
)


def hunyuan_video_i2v() -> Tiny:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**hunyuan_config(), image_condition_type="latent_concat")
    return model, hunyuan_arguments


def hunyuan_video_token_replace() -> Tiny:
    """The tokens of the first frame get a modulation of their own."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**hunyuan_config(), image_condition_type="token_replace")
    return model, hunyuan_arguments


def hunyuan_video_framepack() -> Tiny:
    """Past frames, coarser the older they are, come before the frames to be denoised."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        **hunyuan_config(), has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        history = {"clean": 2, "history_2x": 2, "history_4x": 4}
        past = {f"latents_{key}": noise(batch, 4, n, 2 * h, 2 * w) for key, n in history.items()}
        places = {f"indices_latents_{key}": torch.arange(n) for key, n in history.items()}
        now = {"image_embeds": noise(batch, 3, 16), "indices_latents": torch.arange(f)}
        return hunyuan_arguments(f, h, w, batch) | past | places | now

    return model, arguments


def _ltx2_config() -> Arguments:
    return {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32,
        "num_layers": 2, "caption_channels": 16, "rope_double_precision": False,
    }  # fmt: skip


def ltx2() -> Tiny:
    from diffusers import LTX2VideoTransformer3DModel

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, f * h * w, 4),
            "audio_hidden_states": noise(batch, 9, 4),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "audio_encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500.0),
            "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
            "num_frames": f, "height": h, "width": w, "audio_num_frames": 9, "fps": 25.0,
        }  # fmt: skip

    return LTX2VideoTransformer3DModel(**_ltx2_config()), arguments


def sana_wm_refiner() -> Tiny:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    model = SanaWMLTX2RefinerTransformer3DModel(**_ltx2_config())

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        tables = model.build_rotary_emb_for_absolute_positions(
            batch_size=batch, frame_positions=list(range(f)), height=h, width=w, device="cpu", fps=24.0
        )
        return {
            "hidden_states": noise(batch, f * h * w, 4),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch, f * h * w), 500.0),
            "video_rotary_emb": tables,
            "encoder_attention_mask": torch.ones(batch, TEXT),
        }

    return model, arguments


def sana_video() -> Tiny:
    """Linear attention: softmax is left to cross attention."""
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, 4, f, 2 * h, 2 * w),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.full((batch,), 500),
            "encoder_attention_mask": torch.ones(batch, TEXT),
        }

    return model, arguments


def sana_wm() -> Tiny:
    """Every second block is softmax attention, the others are linear."""
    from diffusers import SanaWMTransformer3DModel

    model = SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=16, caption_channels=16, mlp_ratio=2.0, chunk_plucker_channels=8,
        chunk_plucker_post_attn_blocks=2,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        pose = torch.eye(4).repeat(batch, f, 1, 1)
        pose[..., 2, 3] = torch.arange(f) * 0.1
        lens = torch.tensor([w, h, w / 2, h / 2]).expand(batch, f, 4)
        return {
            "hidden_states": noise(batch, 4, f, h, w),
            "timestep": torch.full((batch, 1, f), 500.0),
            "encoder_hidden_states": noise(batch, 1, TEXT, 16),
            "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
            "camera_conditions": torch.cat([pose.flatten(-2), lens], -1),
            "chunk_plucker": noise(batch, 8, f, h, w),
        }

    return model, arguments


def kandinsky6() -> Tiny:
    from diffusers import Kandinsky6Transformer3DModel

    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32,
        ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=4,
        out_audio_dim=4,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        return {
            "hidden_states": noise(batch, f, 2 * h, 2 * w, 9),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "pooled_projections": noise(batch, 8),
            "timestep": torch.full((batch,), 500.0),
        }

    return model, arguments


def kandinsky6_sr() -> Tiny:
    """Block-sparse attention of its own, through flex_attention, on grids of 8 x 8 tiles."""
    from diffusers import Kandinsky6SRTransformer3DModel

    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=8, time_dim=16, patch_size=(1, 2, 2), model_dim=32, ff_dim=32,
        num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        clip = noise(batch, f, 16 * -(-h // 8), 16 * -(-w // 8), 9)
        return {"hidden_states": clip, "timestep": torch.full((batch,), 500.0)}

    return model, arguments


def minimax_h3() -> Tiny:
    """Text, sound and video lie in one packed sequence, each row told what it is by an index."""
    from diffusers import MiniMaxH3Transformer3DModel

    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1,
        ffn_dim=32, in_channels=24, audio_in_channels=32, text_dim=16, freq_dim=8, time_embed_hidden_dim=24,
        time_embed_dim=16, rope_freq_dim=2,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        sound, frame, tokens = 5, h * w, f * h * w
        tags = torch.tensor(
            [1] * TEXT + [0] * (frame + tokens) + [2] * sound
        )  # a keyframe comes before the clip
        axes = (TEXT + 5 / 3 * torch.arange(f), torch.arange(h) / 3, torch.arange(w) / 3)
        clip = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        places = torch.zeros(len(tags), 3, dtype=torch.float64)
        places[:TEXT, 0] = torch.arange(TEXT)
        places[tags == 0] = torch.cat([clip[-frame:], clip]).double()
        places[tags == 2, 0] = TEXT + torch.arange(sound).double()
        return {
            "hidden_states": noise(batch, frame + tokens, 96),
            "audio_hidden_states": noise(batch, sound, 32),
            "encoder_hidden_states": noise(batch, TEXT, 16),
            "timestep": torch.tensor([0.3, 0.7]),
            "timestep_indices": (tags == 2).long(),
            "token_tags": tags,
            "position_ids": places,
            **{
                f"{name}_indices": (tags == tag).nonzero()[:, 0]
                for tag, name in enumerate(("video", "text", "audio"))
            },
        }

    return model, arguments


def cosmos3() -> Tiny:
    """A language model that attends to itself causally, and video tokens that attend to everything."""
    from diffusers import Cosmos3OmniTransformer

    model = Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, latent_patch_size=1,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=4,
        rope_axes_dim=[2, 3, 3], vocab_size=32,
    )  # fmt: skip

    def arguments(f: int, h: int, w: int, batch: int = 1) -> Arguments:
        length = TEXT + f * h * w
        video = torch.arange(TEXT, length)
        return {
            "input_ids": torch.arange(TEXT), "text_indexes": torch.arange(TEXT),
            "position_ids": torch.arange(length).expand(3, length), "und_len": TEXT,
            "sequence_length": length, "vision_tokens": [noise(1, 4, f, h, w)],
            "vision_token_shapes": [(f, h, w)], "vision_sequence_indexes": video,
            "vision_mse_loss_indexes": video, "vision_timesteps": torch.ones(f * h * w),
            "vision_noisy_frame_indexes": [torch.arange(f)],
        }  # fmt: skip

    return model, arguments


def consisid() -> Tiny:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(**cogvideox_config()), cogvideox_arguments


OTHERS = (
    hunyuan_video_i2v, hunyuan_video_token_replace, hunyuan_video_framepack, ltx2, sana_wm_refiner,
    sana_video, sana_wm, kandinsky6, kandinsky6_sr, minimax_h3, cosmos3, consisid,
)  # fmt: skip

BREAKS_WHEN_REGIONAL = ("wan_animate_2",)
"""Their own blocks cannot be compiled with fullgraph=True: they read numbers from tensors."""
