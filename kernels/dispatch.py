"""Which implementation runs: PyTorch or Triton?"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from .attention import covariance_torch
from .attention import torch as attention_torch
from .blocks import permute_torch, splits_torch
from .measuring import rows_torch
from .papers import kmeans_torch
from .probe import torch as probe_torch
from .routing import torch as routing_torch


class Kernels(NamedTuple):
    """A module for each stage. Whatever the implementation, they have the functions of the PyTorch one.

    `variable` of attention and probe: whether blocks may be of any size; Triton cannot see that from tensors
    on the device.
    """

    splits: ModuleType
    kmeans: ModuleType
    permute: ModuleType
    probe: ModuleType
    route: ModuleType
    covariance: ModuleType
    attention: ModuleType
    rows: ModuleType


_TORCH = Kernels(
    splits_torch, kmeans_torch, permute_torch, probe_torch, routing_torch, covariance_torch, attention_torch,
    rows_torch,
)  # fmt: skip


def kernels_for(x: Tensor) -> Kernels:
    """For the tensor's device: Triton on CUDA, else PyTorch."""
    return _triton() if x.is_cuda else _TORCH


@cache
def _triton() -> Kernels:
    """Imports Triton: not before a CUDA tensor comes."""
    from .attention import covariance_triton
    from .attention import triton as attention_triton
    from .blocks import permute_triton, splits_triton
    from .measuring import rows_triton
    from .papers import kmeans_triton
    from .probe import triton as probe_triton
    from .routing import triton as routing_triton

    return Kernels(
        splits_triton, kmeans_triton, permute_triton, probe_triton, routing_triton, covariance_triton,
        attention_triton, rows_triton,
    )  # fmt: skip
