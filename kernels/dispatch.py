"""Which implementation runs: PyTorch or Triton?"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import attention, covariance, kmeans_steps, permute, probe, route, rows, split_steps


class Kernels(NamedTuple):
    """The modules with the functions of kernels/split_steps.py, kmeans_steps.py, permute.py, probe.py,
    route.py, covariance.py, attention.py and rows.py.

    The last argument of attention's, variable: whether blocks may be of any size (kmeans); Triton cannot
    see from a plan on the device.
    """

    splits: ModuleType
    kmeans: ModuleType
    permute: ModuleType
    probe: ModuleType
    route: ModuleType
    covariance: ModuleType
    attention: ModuleType
    rows: ModuleType


def kernels_for(x: Tensor) -> Kernels:
    """For the tensor's device: Triton on CUDA, else PyTorch."""
    if x.is_cuda:
        from . import (
            triton_attention,
            triton_covariance,
            triton_kmeans,
            triton_permute,
            triton_probe,
            triton_route,
            triton_rows,
            triton_splits,
        )

        return Kernels(
            triton_splits,
            triton_kmeans,
            triton_permute,
            triton_probe,
            triton_route,
            triton_covariance,
            triton_attention,
            triton_rows,
        )
    return Kernels(split_steps, kmeans_steps, permute, probe, route, covariance, attention, rows)
