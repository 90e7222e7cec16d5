"""Real diffusers pipelines from tiny random components: text encoders, tokenizers and VAEs made on the spot.

`build(name)` gives a Tiny: the pipeline, and what to call it with. VAEs compress so little that a clip of
64 x 64 pixels is 3 x 16 x 16 tokens: six blocks of queries, twelve of keys.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT, WIDTH, CHANNELS = 8, 16, 4
TOKENS = 3 * 16 * 16
WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "walks", "dog", "sleeps", "blurred")


@dataclass
class Run:
    """One generation: decoded frames, the last latents, and what the progress bar drew, without its times."""

    frames: Tensor
    latents: Tensor
    bar: list[str]


@dataclass
class Tiny:
    """A pipeline and the arguments of its calls. guided: calls of the transformer per step."""

    pipe: Any
    arguments: dict[str, Any]
    guided: int = 1

    def __call__(self, steps: int = 4, **changes: Any) -> Run:
        """Generates a clip, always from the same noise."""
        bar, last = io.StringIO(), []

        def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last[:] = [tensors["latents"]]
            return tensors

        self.pipe.set_progress_bar_config(file=bar, mininterval=0)
        out = self.pipe(
            num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt",
            callback_on_step_end=keep, **{**self.arguments, **changes},
        )  # fmt: skip
        drawn = [re.sub(r"\[.*", "", line).strip() for line in re.split(r"[\r\n]", bar.getvalue())]
        return Run(out.frames, last[0], [line for line in drawn if line])


def tokenizer() -> Any:
    """Words apart by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT
    )


def t5(umt5: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, model = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    values = config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2,
        relative_attention_num_buckets=8,
    )  # fmt: skip
    return model(values)


def clip_text() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return LlamaModel(config)


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip


def wan_transformer(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32,
        "in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 64,
        "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**{**config, **changes})


def _flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=7.0)


_CALL = {"prompt": "a cat walks", "height": 64, "width": 64, "num_frames": 5}
_GUIDED = {**_CALL, "negative_prompt": "blurred", "guidance_scale": 5.0}


def wan() -> Tiny:
    from diffusers import WanPipeline

    pipe = WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5(umt5=True), vae=_wan_vae(), scheduler=_flow(),
        transformer=wan_transformer(),
    )  # fmt: skip
    return Tiny(pipe, {**_GUIDED, "max_sequence_length": TEXT}, guided=2)


def wan22() -> Tiny:
    """Two transformers, one for the first steps and one for the last."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5(umt5=True), vae=_wan_vae(), scheduler=unipc,
        transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.875,
    )  # fmt: skip
    return Tiny(pipe, {**_GUIDED, "max_sequence_length": TEXT}, guided=2)


def wan_i2v() -> Tiny:
    from diffusers import WanImageToVideoPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=t5(umt5=True), vae=_wan_vae(), scheduler=_flow(),
        image_encoder=CLIPVisionModel(vision), image_processor=CLIPImageProcessor(crop_size=16, size=16),
        transformer=wan_transformer(in_channels=2 * CHANNELS + 2, image_dim=WIDTH, added_kv_proj_dim=64),
    )  # fmt: skip
    image = Image.new("RGB", (64, 64), (200, 100, 50))
    # The image's cross attention takes the last 512 tokens for text.
    return Tiny(pipe, {**_GUIDED, "image": image, "max_sequence_length": 512}, guided=2)


def wan_v2v() -> Tiny:
    """It runs the last `strength` of the steps."""
    from diffusers import WanVideoToVideoPipeline
    from PIL import Image

    pipe = WanVideoToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=t5(umt5=True), vae=_wan_vae(), scheduler=_flow(),
        transformer=wan_transformer(),
    )  # fmt: skip
    video = [Image.new("RGB", (64, 64), (40 * n, 100, 50)) for n in range(5)]
    given = {name: value for name, value in _GUIDED.items() if name != "num_frames"}
    return Tiny(pipe, {**given, "video": video, "max_sequence_length": TEXT}, guided=2)


def hunyuan_video() -> Tiny:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3, up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        spatial_compression_ratio=2, temporal_compression_ratio=4, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        text_embed_dim=WIDTH, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        tokenizer=tokenizer(), text_encoder=llama(), tokenizer_2=tokenizer(), text_encoder_2=clip_text(),
        vae=vae, scheduler=_flow(), transformer=transformer,
    )  # fmt: skip
    template = {"template": "{}", "crop_start": 0}
    return Tiny(pipe, {**_CALL, "num_frames": 9, "prompt_template": template, "max_sequence_length": TEXT})


def cogvideox() -> Tiny:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        latent_channels=CHANNELS, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        temporal_compression_ratio=2, sample_height=64, sample_width=64,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
        time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=32, sample_height=32,
        sample_frames=5, patch_size=2, temporal_compression_ratio=2, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae, scheduler=CogVideoXDDIMScheduler(),
        transformer=transformer,
    )  # fmt: skip
    return Tiny(pipe, {**_GUIDED, "max_sequence_length": TEXT})


def ltx() -> Tiny:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        spatio_temporal_scaling=(True, True, False), decoder_spatio_temporal_scaling=(True, True, False),
        layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        decoder_inject_noise=(False,) * 4, upsample_residual=(False,) * 3, upsample_factor=(1,) * 3,
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        patch_size=1, patch_size_t=1, timestep_conditioning=False,
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = LTXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae, scheduler=_flow(), transformer=transformer
    )
    return Tiny(pipe, {**_GUIDED, "num_frames": 9, "max_sequence_length": TEXT})


BUILDERS: tuple[Callable[[], Tiny], ...] = (wan, wan22, wan_i2v, wan_v2v, hunyuan_video, cogvideox, ltx)


def build(name: str) -> Tiny:
    """Always the same weights, and nothing dropped out."""
    torch.manual_seed(0)
    tiny = {builder.__name__: builder for builder in BUILDERS}[name]()
    for part in tiny.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return tiny
