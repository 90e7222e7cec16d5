"""A small Wan transformer of 768 video tokens, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from pipelines.tiny import CHANNELS, TEXT, WIDTH, wan_transformer
from torch import Tensor
from toy import EAGER

DENSITY_1 = {**EAGER, "density": 1.0}
SPARSE_3 = {**EAGER, "density": 0.3}
LAYERS = 2
ROUNDING = 1e-6
"""Of float32: what reordering the sums of an attention may change."""


def wan(**changes: Any) -> Any:
    """Always the same weights."""
    torch.manual_seed(0)
    return wan_transformer(**changes).eval()


def arguments(
    timestep: float = 500, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, 3, 32, 32, generator=g).to(dtype),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT, WIDTH, generator=g).to(dtype),
        "return_dict": False,
    }


def blockwise(model: Any, options: dict[str, Any], fullgraph: bool = True) -> Any:
    model.compile_repeated_blocks(backend="svg_ear", fullgraph=fullgraph, options=options)
    return model


def error(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
