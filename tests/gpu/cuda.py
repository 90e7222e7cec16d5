"""What tests of whole calls on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, ...]:
    """query, key, value [B,H,L,D], strided as a model's [B,L,H,D]."""
    B, H, L, D = shape
    random = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(3, B, L, H, D, device="cuda", generator=random)
    return tuple(y.to(dtype).transpose(1, 2) for y in x)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
