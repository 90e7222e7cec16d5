"""A small video transformer: 5-D clips, self and cross attention, a timestep; and how tests compile it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svg_ear_compile


class ToyAttention(nn.Module):
    """Self attention, or cross attention where a context is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class ToyBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn1, self.attn2 = ToyAttention(width, heads), ToyAttention(width, heads)

    def forward(self, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        x = x + self.attn1(self.norm(x) + temb[:, None])
        return x + self.attn2(x, text)


class ToyVideo(nn.Module):
    """Patches of a [B,3,F,H,W] clip as tokens, one per 1 x 2 x 2 pixels; `layers` blocks; back to pixels."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, 12)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.patch(hidden_states)
        frames, height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        temb = self.time(timestep.float()[:, None] / 1000)
        for block in self.blocks:
            x = block(x, encoder_hidden_states, temb)
        x = self.out(x).unflatten(1, (frames, height, width)).unflatten(-1, (3, 2, 2))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


class ToyInputs:
    """Arguments of ToyVideo: frames x size/2 x size/2 tokens, the given timestep."""

    def __call__(
        self, timestep: float = 999, frames: int = 4, size: int = 16, seed: int = 0
    ) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        clip = torch.randn(1, 3, frames, size, size, generator=g)
        return clip, torch.tensor([float(timestep)]), torch.randn(1, 7, 32, generator=g)


SPARSE = {"min_tokens": 64, "strict": True, "dense_steps": 0, "dense_layers": 0, "density": 0.25}
"""Every self attention sparse in every call."""
EAGER = {**SPARSE, "inner": "eager"}


def compiled(model: nn.Module, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return torch.compile(model, backend="svg_ear", options=options, **kwargs)


def calls() -> tuple[int, dict[str, int]]:
    totals = svg_ear_compile.report().totals()
    return totals["sparse_calls"], totals["dense_calls"]
