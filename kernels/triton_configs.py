"""Which tile sizes does each GPU get? Pinned, so that a GPU always runs the same code."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """block_m queries x block_n kept keys (two such tiles at once with pair) or block_c centroids per step.

    tma: tiles come by the tensor memory accelerator (sm_90 on) instead of by pointers. Its rows are whole 16
    bytes: a head_dim that is no multiple of 8 gets the configuration of an older GPU.
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    centroid_stages: int
    pair: bool = False
    tma: bool = False


def config_for(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, variable: bool) -> Config:
    """The configuration of a GPU (compute capability; (0, 0) is Triton's interpreter)."""
    if capability == (0, 0):
        return Config(64, 64, 64, 4, 1, 1)
    if dtype == torch.float32:
        stages = 2 if head_dim <= 128 else 1
        return Config(32, 32, 32, 4, stages, stages)
    if _has_tma(capability, head_dim):
        if head_dim > 128:
            return Config(64, 64, 64, 8, 2, 2, tma=True)
        if capability[0] == 9 and head_dim > 64 and not variable:
            return Config(128, 64, 128, 8, 3, 2, pair=True, tma=True)
        return Config(128, 64, 64, 8, 3, 3, pair=not variable, tma=True)
    if head_dim > 128:
        return Config(64, 32, 32, 8, 2, 2)
    if head_dim > 64 and capability >= (12, 0):
        # 36 KB, so two programs per multiprocessor, as FlashAttention-2 found best for 8.6 and 8.9; not timed here.
        return Config(64, 32, 32, 4, 2, 2)
    if head_dim > 64:
        return Config(128, 64, 32, 8, 2, 2) if head_dim == 128 else Config(64, 64, 32, 4, 2, 2)
    return Config(128, 64, 64, 8, 2, 2)


def _has_tma(capability: tuple[int, int], head_dim: int) -> bool:
    """For two-byte numbers."""
    return capability[0] in (9, 10) and head_dim % 8 == 0


def probe_config_for(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration of the probe: block_m query centroids, tiles of 64 keys."""
    if capability == (0, 0):
        return Config(64, 64, 64, 4, 1, 1)
    if dtype == torch.float32:
        return Config(32 if head_dim <= 128 else 16, 64, 64, 4, 1, 1)
    tma = _has_tma(capability, head_dim)
    if head_dim > 128:
        return Config(64, 64, 64, 8, 2 if tma else 1, 1, tma=tma)
    # 128 registers a thread and under 100 KB, so two programs per multiprocessor: one computes while the other waits.
    return Config(128, 64, 64, 8, 2, 1, tma=True) if tma else Config(64, 64, 64, 8, 2, 1)


def assign_config_for(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration of k-means: block_m tokens, block_c centroids."""
    if capability == (0, 0):
        return Config(64, 0, 16, 4, 1, 1)
    if dtype == torch.float32:
        return Config(64 if head_dim <= 128 else 32, 0, 32, 4, 1, 1)
    tma = _has_tma(capability, head_dim)
    if head_dim > 128:
        return Config(64, 0, 64, 4, 2, 2, tma=tma)
    return Config(128, 0, 64, 8, 2, 2, tma=True) if tma else Config(64, 0, 64, 4, 2, 2)
