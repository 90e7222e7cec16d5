"""Which attention kernel runs, and why no faster one? Imports Triton only where there is a GPU to run it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256
"""Of the Triton kernels: registers hold no more."""
HOPPER_HEAD_DIMS = (64, 128)
GLUON_VERSIONS = ((3, 6), (3, 9))
"""The first and last release of Triton for which hopper.py was written: Gluon is experimental."""


class Choice(NamedTuple):
    """What runs, for the report.

    name: "PyTorch" (torch.py), "Triton" (triton.py), "Gluon for Hopper" (hopper.py), or
    "dense" where none of them can run. reason: why it is no faster one, in words; "" for the fastest.
    """

    name: str
    reason: str


def attention_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, variable: bool = False
) -> Choice:
    """The kernel of a sparse call of `svg_ear::attention`. variable: blocks of any size (order "kmeans")."""
    if device.type != "cuda":
        return Choice("PyTorch", f"the tensors are on {device.type}; the Triton kernels run on CUDA GPUs")
    if head_dim > MAX_HEAD_DIM:
        return Choice("dense", f"head_dim is {head_dim}; the Triton kernels take up to {MAX_HEAD_DIM}")
    try:
        from ..triton_tiles import capability, version
    except ImportError as error:
        return Choice("dense", f"Triton cannot be imported ({error}); install the one of this PyTorch")
    why_not = why_not_hopper(capability(device), dtype, head_dim, variable, version())
    return Choice("Triton", why_not) if why_not else Choice("Gluon for Hopper", "")


def why_not_hopper(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, variable: bool, triton_version: str
) -> str:
    """Why hopper.py does not compute such an `attend`; "" if it does."""
    if capability != (9, 0):
        return "the faster kernel is for Hopper GPUs, sm_90; this one is sm_{}{}".format(*capability)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the faster kernel takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HOPPER_HEAD_DIMS:
        return f"the faster kernel takes head_dim 64 or 128, not {head_dim}"
    if variable:
        return "the faster kernel takes equal tiles, not clusters of any size"
    return _why_not_gluon(triton_version)


@cache
def _why_not_gluon(triton_version: str) -> str:
    """Why hopper.py does not work with this Triton; "" if it does."""
    first, last = GLUON_VERSIONS
    if not first <= tuple(int(x) for x in triton_version.split(".")[:2]) <= last:
        known = " to ".join(".".join(map(str, x)) for x in GLUON_VERSIONS)
        return f"the faster kernel was written for Triton {known}, this is {triton_version}"
    try:
        from . import hopper  # noqa: F401 - only whether it can be imported
    except ImportError as error:
        return f"the faster kernel cannot be imported with Triton {triton_version}: {error}"
    return ""
