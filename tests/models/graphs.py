"""Small functions around one attention call, captured as Dynamo graphs with made-up arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models.capture import Backend, Captured, Knobs, fresh_dynamo
from torch import Tensor


def captured(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **knobs: Any) -> Captured:
    """The one graph of a call of a function, and what the passes say about it."""
    backend = Backend(Knobs(**knobs))
    with fresh_dynamo():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (graph,) = backend.captured
    return graph


def heads(x: Tensor, count: int = 2) -> Tensor:
    """[B, L, C] -> [B, heads, L, C / heads]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def tokens(video: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, F*H*W, C]."""
    return video.flatten(2).transpose(1, 2)


def video(channels: int = 32, frames: int = 3, height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(1, channels, frames, height, width)
