"""At real token counts and default thresholds: videos are rewritten, and nothing else is.

Real classes, tiny widths. Nothing runs: a graph is looked at, and then the model is stopped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.capture import Backend, Knobs, compiled, fresh_dynamo
from models.tiny import build
from models.tiny_parts import wan_arguments, wan_config
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from svg_ear_compile.passes.site import Site

LONG = 16_384
"""Tokens of an image of 2048 x 2048 pixels in Flux."""


class Stop(Exception):  # noqa: N818 - no error
    """A graph was looked at."""


def first_sites(model: nn.Module, arguments: dict[str, Any], regional: bool, **how: Any) -> list[Site]:
    """The sites of the first graph with any; graphs before it run."""

    def inner(gm: fx.GraphModule, _: list[Any]) -> Any:
        if backend.sites:
            raise Stop
        return gm.forward

    backend = Backend(Knobs(min_tokens=None), inner=inner)
    with fresh_dynamo():
        run = compiled(model, backend, regional, **how)
        with pytest.raises(BackendCompilerFailed, match="Stop"):
            run(**arguments)
    return backend.sites


def vit(size: int) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=size,
        patch_size=2,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).eval(), {"pixel_values": torch.zeros(1, 3, size, size)}


def wan(*size: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**wan_config() | {"rope_max_seq_len": 128}).eval(), wan_arguments(*size)


def sized(name: str, *size: int) -> tuple[nn.Module, dict[str, Any]]:
    model, arguments = build(name)
    return model, arguments(*size)


CASES = {
    "Flux at 2048 pixels": (lambda: sized("flux", 1, 128, 128), False, "NOT_VIDEO"),
    "a block of it": (lambda: sized("flux", 1, 128, 128), True, "NO_SIGN_OF_VIDEO"),
    "a vision transformer": (lambda: vit(256), False, "NOT_VIDEO"),
    "a VAE for images": (lambda: sized("image_vae", 1, 128, 128), False, "NOT_VIDEO"),
    "a VAE for video": (lambda: sized("video_vae", 2, 128, 128), False, "FACTORISED"),
    "a language model": (lambda: sized("llama", 1, 128, 128), False, "MASK"),
    "Wan with one frame": (lambda: wan(1, 128, 128), False, "NOT_VIDEO"),
    "a block of it with one frame": (lambda: wan(1, 128, 128), True, "NOT_VIDEO"),
    "HunyuanVideo with one frame": (lambda: sized("hunyuan_video", 1, 128, 128), False, "NOT_VIDEO"),
    "LTX with one frame": (lambda: sized("ltx", 1, 128, 128), False, "NOT_VIDEO"),
    "a block of LTX with one frame": (lambda: sized("ltx", 1, 128, 128), True, "NOT_VIDEO"),
    "CogVideoX with one frame": (lambda: sized("cogvideox", 1, 128, 128), False, "NOT_VIDEO"),
    "Wan": (lambda: wan(4, 64, 64), False, "REWRITTEN"),
    "a block of Wan": (lambda: wan(4, 64, 64), True, "REWRITTEN"),
    "a block of LTX": (lambda: sized("ltx", 4, 64, 64), True, "REWRITTEN"),
    "a short Wan": (lambda: wan(4, 32, 32), False, "TOO_FEW_TOKENS"),
}


SLOW = {
    "a VAE for images", "HunyuanVideo with one frame", "LTX with one frame", "CogVideoX with one frame",
    "a block of LTX",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_defaults(case: str) -> None:
    make, regional, reason = CASES[case]
    model, arguments = make()
    sites = first_sites(model, arguments, regional)
    found = [site for site in sites if site.kind != "cross" and site.verdict.reason.name != "TEXT"]
    assert {site.verdict.reason.name for site in found} == {reason}
    assert {site.q_hint >= LONG for site in found} == {case != "a short Wan"}


def test_a_block_of_any_length_sees_frames_call_by_call() -> None:
    for frames, side in ((1, 128), (4, 64)):
        site = first_sites(*wan(frames, side, side), regional=True, dynamic=True)[0]
        assert (site.verdict.rewrite, site.min_tokens, site.min_frames) == (True, 8192, 2)
