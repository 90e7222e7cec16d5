"""Kept blocks exactly, skipped blocks by their centroids: one Triton kernel, one online softmax.

Formula (kernels/plan.py; arXiv 2603.08982). For a query q of block i, s(q,k) = scale q.k:

    num(q) = sum_{j kept} sum_{t in j} exp(s(q,k_t)) v_t + sum_j exp(s(q,kc_j) + bias_ij) vc_j
    den(q) = the same sums without the values;   out(q) = num(q) / den(q)

Shapes and layout: query, out and exact [B,H,L,D] in token order, any strides with D contiguous (they lie as
[B,L,H,D]); the tensors of the plan are contiguous. One program computes BLOCK_M queries of one block: it
gathers their rows through query_order, walks the block's kept list (first stream) and all centroids with the
bias as mask (second stream), and scatters the outputs. So only key and value are permuted through memory.

- Logits, maxima, sums and outputs are accumulated in float32, weights rounded to the input's dtype before the
  second product, exp2 with log2(e) folded into the scale. float32 inputs: three TF32 products each.
- A key tile is the window of BLOCK_N slots that ends where the block's part ends. Its other slots are valid keys of
  the same head, or zeros; they get -inf. Slots past the valid keys are not read.
- The programs of a head start heaviest first; heads follow one another, so that a head's keys stay in L2.
- Deterministic: no atomics, sums in a fixed order. Nothing is read back; a CUDA graph can capture it.
- A query without any kept key or centroid: out 0 and lse -inf, as in scaled_dot_product_attention.
- Not supported: dropout, causal masks, grouped heads, gradients, head_dim > 256, a scale of 0 or below.

Two families of plans (`variable`): equal tiles, whose query blocks have at most 128 and key blocks at most 64
tokens, and clusters of any sizes, cut into tiles here (correct for equal tiles too, but slower).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan, Terms, term_blocks
from ..triton_configs import Config, config_for
from ..triton_tiles import capability, descriptor, version
from .choice import MAX_HEAD_DIM, why_not_hopper
from .schedule_triton import schedule
from .triton_kernel import attention_kernel


def sparse_exact(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the kept blocks' softmax into out [B,H,L,D]; returns (out, lse [B,H,L] float32)."""
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _launch(query, plan, scale, out, None, lse, variable, config, None)
    return out, lse


def centroid_compensation(
    query: Tensor, exact: Tensor, lse: Tensor, plan: SparsePlan, scale: float, out: Tensor,
    variable: bool = True, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Writes the joint softmax of the exact part and the centroids into out and returns it."""
    _launch(query, plan, scale, out, exact, lse.contiguous(), variable, config, None)
    return out


def attend(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    config: Config | None = None,
    terms: Terms | None = None,
) -> Tensor:
    """Both in one. Without a config this is the GPU's best kernel, which may be the one in hopper.py."""
    found = capability(query.device), query.dtype, query.shape[-1], variable, version()
    if config is None and scale > 0 and not why_not_hopper(*found):
        from . import hopper

        return hopper.attend(query, plan, scale, out, terms)
    _launch(query, plan, scale, out, None, None, variable, config, terms)
    return out


def _launch(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, exact: Tensor | None, lse: Tensor | None,
    variable: bool, config: Config | None, terms: Terms | None,
) -> None:  # fmt: skip
    B, H, L, D = query.shape
    Cq, Ck = plan.bias.shape[-2:]
    if D > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {D} is not supported: at most {MAX_HEAD_DIM}")
    if scale <= 0:
        raise ValueError(f"the scale of the logits must be positive, not {scale}")
    if query.stride(-1) != 1:
        query = query.contiguous()
    if exact is not None and exact.stride(-1) != 1:
        exact = exact.contiguous()
    c = config or config_for(capability(query.device), D, query.dtype, variable)
    streams = exact is None, exact is not None or lse is None, terms is not None
    options = meta(c, D, query.dtype, variable, *streams)
    tile_block, tile_first = schedule(plan, c.block_m, variable)
    tiles = tile_block.shape[-1] * max(options["PARTS"], 1)
    keys: list[Any] = [plan.key, plan.value, plan.key_centroids, plan.value_centroids]
    if c.tma:
        rows = (c.block_n, c.block_n, c.block_c, c.block_c)
        keys = [descriptor(x, n, options["BLOCK_D"]) for x, n in zip(keys, rows, strict=True)]
    state = out if exact is None else exact
    places, matrices = (plan.kept_count, plan.key) if terms is None else terms  # unused without terms
    attention_kernel[(tiles, H, B)](
        query, *keys, plan.query_order, plan.query_offsets, plan.key_offsets, plan.bias, plan.kept_count,
        plan.kept_blocks, tile_block, tile_first, state, plan.bias if lse is None else lse, places,
        matrices, out, scale, H, L, Cq, Ck, tiles, matrices.shape[1], term_blocks(Cq),
        *query.stride()[:3], *out.stride()[:3], *state.stride()[:3], **options,
    )  # fmt: skip


def meta(
    c: Config,
    head_dim: int,
    dtype: torch.dtype,
    variable: bool,
    exact: bool,
    centroids: bool,
    terms: bool = False,
) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    walk = variable or c.block_n < KEY_BLOCK
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n, "BLOCK_C": c.block_c, "EXACT": exact, "CENTROIDS": centroids,
        "TERMS": terms, "CHUNK": min(block_d, 16),
        "PARTS": 0 if variable else QUERY_BLOCK // c.block_m, "WALK": walk, "PAIR": c.pair and not walk,
        "TMA": c.tma, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "STAGES": c.num_stages,
        "CENTROID_STAGES": c.centroid_stages, "num_warps": c.num_warps, "num_stages": c.num_stages,
        "enable_fp_fusion": True,
    }  # fmt: skip
