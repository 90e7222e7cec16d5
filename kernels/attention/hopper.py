"""Kept blocks exactly, skipped blocks by their centroids: the kernel for Hopper GPUs, in Gluon.

Formula, shapes and layout: triton.py, which hands over to it `attend` of equal tiles, head_dim 64
or 128, float16 or bfloat16, on sm_90. What differs from the Triton kernel is the structure, that of
FlashAttention-3 (arXiv 2407.08608), but its two groups of warps do not take strict turns:

- One program computes 128 queries. One warp loads tiles of 128 keys and of their values (two kept blocks of
  up to 64, or 128 centroids) by the tensor memory accelerator into rings in shared memory; two groups of four
  warps compute 64 queries each. Barriers in shared memory hand the stages of the rings back and forth.
- The softmax of a tile starts while the previous tile's product with its values is still running; the matrix products
  of the other group hide it.
- Centroids come first: there are always some, so the kept blocks need no special first step.
- First-order terms (kernels/attention/first_order.py) are one more tile in the ring of values: the matrix of a
  query block's group.
- A bias costs no addition: divided by the scale, it is the initial accumulator of the logits' matrix product. Tiles of
  kept keys have neither: where not all of 128 keys count, the others' logits are overwritten.

Logits, maxima, sums and outputs are float32, as there; every sum has a fixed order. Gluon is experimental and
changes between releases: choice.py says for which ones this was written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..hopper_tiles import boxes
from ..plan import SparsePlan, Terms, term_blocks
from .hopper_kernel import attention_kernel
from .schedule_triton import heaviest_first


def attend(query: Tensor, plan: SparsePlan, scale: float, out: Tensor, terms: Terms | None = None) -> Tensor:
    """Writes into out and returns it."""
    B, H, L, D = query.shape
    Cq, Ck = plan.bias.shape[-2:]
    if query.stride(-1) != 1:
        query = query.contiguous()
    sources = [boxes(x) for x in (plan.key, plan.value, plan.key_centroids, plan.value_centroids)]
    if terms is None:  # whatever: it is not used
        places, matrices, n = plan.kept_count, sources[0], 0
    else:
        places, matrices, n = terms.places, boxes(terms.matrices.flatten(1, 2)), terms.matrices.shape[1]
    attention_kernel[(Cq, H, B)](
        query, *sources, plan.query_order, plan.query_offsets, plan.key_offsets, plan.bias,
        plan.kept_count, plan.kept_blocks, heaviest_first(plan.kept_count), places, matrices, out,
        scale, H, L, Cq, Ck, n, term_blocks(Cq), *query.stride()[:3], *out.stride()[:3],
        **meta(D, terms is not None),
    )  # fmt: skip
    return out


def meta(head_dim: int, terms: bool = False) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    # num_warps: those of one group. 3 x 128 threads x 168 registers are all that a multiprocessor has.
    return {
        "HEAD_DIM": head_dim, "STAGES": 2, "TERMS": terms, "num_warps": 4, "maxnreg": 168,
        "enable_fp_fusion": True,
    }  # fmt: skip
