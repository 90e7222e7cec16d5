"""Which implementation runs: PyTorch or Triton?"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import attention, permute, probe, route


class Kernels(NamedTuple):
    """The modules with the functions of kernels/permute.py, probe.py, route.py and attention.py.

    The last argument of attention's, variable: whether blocks may be of any size (kmeans); Triton cannot
    see from a plan on the device.
    """

    permute: ModuleType
    probe: ModuleType
    route: ModuleType
    attention: ModuleType


def kernels_for(query: Tensor) -> Kernels:
    """For the query's device: Triton on CUDA, else PyTorch."""
    if query.is_cuda:
        from . import triton_attention, triton_permute, triton_probe, triton_route

        return Kernels(triton_permute, triton_probe, triton_route, triton_attention)
    return Kernels(permute, probe, route, attention)
