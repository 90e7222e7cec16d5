"""Attention calls of real video models: their sizes, and inputs that have a structure to find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = list[tuple[Tensor, Tensor, Tensor]]


class Shape(NamedTuple):
    """Tokens of one attention call: a frame grid of video, and text, whose last `padded` are masked."""

    name: str
    grid: tuple[int, int, int]
    text: int
    text_first: bool
    heads: int
    head_dim: int
    padded: int = 0

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text


SHAPES = {
    "wan": Shape("Wan 14B 720p", (21, 45, 80), 0, False, 40, 128),
    "wan480": Shape("Wan 14B 480p", (21, 30, 52), 0, False, 40, 128),
    "wan1.3b": Shape("Wan 1.3B 480p", (21, 30, 52), 0, False, 12, 128),
    "hunyuan": Shape("HunyuanVideo 720p", (33, 45, 80), 256, False, 24, 128, padded=192),
    "hunyuan1.5": Shape("HunyuanVideo 1.5 720p", (31, 45, 80), 1985, False, 16, 128),
    "cogvideox": Shape("CogVideoX 5B", (13, 30, 45), 226, True, 48, 64),
    "ltx": Shape("LTX", (11, 24, 28), 0, False, 32, 64),
    "long": Shape("long video", (64, 64, 64), 0, False, 24, 128),
}


def padding_mask(shape: Shape) -> Tensor | None:
    """[1,1,1,L] bool as the model builds it, False for padded text; None where it has no padding."""
    if not shape.padded:
        return None
    return (torch.arange(shape.length, device="cuda") < shape.length - shape.padded).view(1, 1, 1, -1)


def make_inputs(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [1,H,L,D] bfloat16, strided as [1,L,H,D].

    Per head: 24 smooth random fields over the grid, at three scales, mixed into D channels by random matrices
    (query's and key's are alike, so that neighbours attend to each other), plus noise.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    H, L, D = shape.heads, shape.length, shape.head_dim
    out = torch.empty(3, 1, L, H, D, device="cuda", dtype=torch.bfloat16)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", generator=random)

    video = slice(shape.text, L) if shape.text_first else slice(0, L - shape.text)
    text = slice(0, shape.text) if shape.text_first else slice(L - shape.text, L)
    for head in range(H):
        parts = []
        for cells in (3, 6, 12):
            coarse = noise(1, 8, *(min(cells, n) for n in shape.grid))
            field = F.interpolate(coarse, size=shape.grid, mode="trilinear", align_corners=True)
            parts.append(field.flatten(2)[0].T)
        fields = torch.cat(parts, 1)
        fields = torch.cat([fields / fields.std(0), noise(shape.text, 24)])
        shared, own = noise(24, D), noise(3, 24, D)
        for i, amount in enumerate((0.3, 0.3, 1.0)):
            mixed = fields @ ((1 - amount) * shared + amount * own[i]) / 24**0.5
            mixed = 1.5 * mixed + 0.5 * noise(L, D) * (1 if i < 2 else 2)
            out[i, 0, video, head] = mixed[: L - shape.text].bfloat16()
            out[i, 0, text, head] = mixed[L - shape.text :].bfloat16()
    query, key, value = out.transpose(2, 3)
    return query, key, value
