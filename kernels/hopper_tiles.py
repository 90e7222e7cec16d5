"""What the Gluon kernels for Hopper GPUs share: tiles of two key blocks, loaded by one warp for two groups of warps."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .plan import KEY_BLOCK, QUERY_BLOCK

# What Gluon has renamed between Triton 3.6 and 3.9.
_load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(KEY_BLOCK)
STEP = gl.constexpr(2 * KEY_BLOCK)  # keys per step
ROWS = gl.constexpr(QUERY_BLOCK // 2)  # queries per group of warps
BOX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
_BOX = gl.constexpr(BOX)
_COLUMNS = gl.constexpr(64)  # 128 bytes, as many as a box of the tensor memory accelerator can have
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * KEY_BLOCK, 16]))


def boxes(x: Tensor) -> TensorDescriptor:
    """What load_tile needs: x [B,H,C,D] contiguous."""
    B, H, C, D = x.shape
    return TensorDescriptor(x, [B * H, C, D], [C * D, D, 1], [1, KEY_BLOCK, 64], BOX)


@gluon.jit
def reinterpret(memory, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape."""
    if _RENAMED:  # a constant: the other branch must not be compiled
        view = memory.reinterpret(memory.dtype, shape, layout)
    else:
        view = memory._reinterpret(memory.dtype, shape, layout)
    return view


@gluon.jit
def new_ring(dtype: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    """(tiles [STAGES,STEP,D], barriers "is loaded", barriers "both groups are done with it") in shared memory."""
    tiles = gl.allocate_shared_memory(dtype, [STAGES, STEP, D], TILE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    return tiles, ready, free


@gluon.jit
def load_tile(source, head, first0, first1, ring, step):
    """Loads two windows of 64 rows into this step's stage of the ring, once both groups are done with it. Rows
    outside the head are zero."""
    tiles, ready, free = ring
    STAGES: gl.constexpr = tiles.shape[0]
    PARTS: gl.constexpr = tiles.shape[2] // _COLUMNS
    # The tiles' boxes as they lie in memory.
    boxes = reinterpret(tiles, [STAGES * PARTS * 2, 1, BLOCK, _COLUMNS], _BOX)
    stage = step % STAGES
    mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(stage), STEP * PARTS * _COLUMNS * 2)
    for part in gl.static_range(PARTS):
        box = (stage * PARTS + part) * 2
        _load_box(source, [head, first0, part * _COLUMNS], ready.index(stage), boxes.index(box))
        _load_box(source, [head, first1, part * _COLUMNS], ready.index(stage), boxes.index(box + 1))
