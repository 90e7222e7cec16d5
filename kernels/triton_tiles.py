"""What the Triton kernels share: tiles of rows, by pointers or tensor memory accelerator; keys of floats."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(source, head, first, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """Rows first..first+BLOCK of one head of source [heads, length, HEAD_DIM]. Outside the head TMA gives zeros, and
    pointers the nearest row: the caller masks them with the bias of the logits."""
    if TMA:
        tile = source.load([head, first, 0]).reshape(BLOCK, BLOCK_D)
    else:
        rows = tl.minimum(tl.maximum(first + tl.arange(0, BLOCK), 0), length - 1)
        columns = tl.arange(0, BLOCK_D)
        start = source + head.to(tl.int64) * length * HEAD_DIM
        where = start + rows.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
        tile = tl.load(where, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def ordered_bits(x):
    """Unsigned integers in the order of floats; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


def descriptor(x: Tensor, rows: int, block_d: int) -> Any:
    """What load_rows needs for TMA: x [B,H,C,D] contiguous, tiles of [rows, block_d]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, H, C, D = x.shape
    return TensorDescriptor(x, [B * H, C, D], [C * D, D, 1], [1, rows, block_d])


def version() -> str:
    """The version of Triton."""
    return str(triton.__version__)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) without a GPU, under Triton's interpreter. AMD GPUs, whose numbers mean other things,
    count as 8.0: tiles by pointers, at most 64 KB."""
    if torch.version.hip:
        return 8, 0
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
