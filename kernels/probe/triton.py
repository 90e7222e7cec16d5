"""Query centroids against all true keys (kernels/probe/torch.py), without a [Cq, L] matrix in memory.

Formulas as in kernels/probe/__init__.py. For query centroid i and key block j of n_j keys, s_t = scale qc_i.k_t,
m_ij = max_t s_t, w_t = exp(s_t - m_ij) and W = sum_t w_t:

    lse_ij   = m_ij + log W,   gap_ij = lse_ij - log n_j - scale qc_i.kc_j
    error_ij = 2 (m_ij - c_i) + log lost_ij - log n_j
    "output_error": lost_ij = |sum_t (w_t - W / n_j) v_t|^2,               c_i = log sum_j exp(lse_ij)
    "svg_ear":      lost_ij = sum_t |w_t v_t - exp(sbar_ij - m_ij) vc_j|^2,  c_i = max_j m_ij

The first is |sum_t w_t (v_t - vc_j)|^2 from there, with the mean of the values written out: weights are centred
instead of values, on the chip and before they are rounded for the second product.

One program takes BLOCK_M query centroids and a run of key blocks; logits and weights stay on the chip. Query
and key centroids are rounded to the dtype of the keys, as the attention kernel will see them: the gap makes
up for what that does to a centroid's logit. c_i is summed run by run and known only at the end: the scores carry it
in `parts`, and the routing subtracts it. Routing "mass" reads no key, so there is nothing to fuse:
kernels/probe/torch.py computes it.

key, value [B,H,L,D] contiguous in block order; blocks of any size, in tiles of 64 keys (windows that end with
the block's part, as in kernels/attention/triton.py): one pass where no block is larger (ONE_TILE), else two.
Accumulators and results float32; scores lie as [B,H,Ck,Cq], so that a program writes whole lines.
Deterministic, nothing is read back. The scale must be positive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..attention.choice import why_not_hopper
from ..plan import KEY_BLOCK
from ..triton_configs import Config, probe_config_for
from ..triton_tiles import capability, descriptor, version
from .torch import centroid_mass
from .triton_kernel import probe_kernel, spread_kernel

BLOCK_N = KEY_BLOCK
BLOCKS_PER_PROGRAM = 64


class RowScores(NamedTuple):
    """probe.Scores, but for the errors' scale: each row's own (kernels/routing/triton.py brings them to one).

    mass: None for "output_error". parts: [B,H,runs,Cq] float32; c_i = logsumexp over the runs ("output_error")
    or their maximum ("svg_ear"), and 2 c_i is yet to be taken off the errors.
    """

    error: Tensor
    mass: Tensor | None
    gap: Tensor
    parts: Tensor


def probe(
    query_centroids: Tensor,
    key: Tensor,
    value: Tensor,
    key_offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    scale: float,
    routing: str,
    variable: bool = True,
    config: Config | None = None,
) -> RowScores:
    """Scores of all blocks, as kernels/probe/torch.py's function of this name. Without a config this is the GPU's
    best kernel, which may be the one in hopper.py."""
    if routing == "mass":
        found = centroid_mass(query_centroids, key_centroids, key_offsets, scale)
        return RowScores(*found, torch.zeros_like(found.mass[:, :, None, :, 0]))
    if routing not in ("output_error", "svg_ear"):
        raise ValueError(f"unknown routing {routing!r}")
    if scale <= 0:
        raise ValueError(f"the scale of the logits must be positive, not {scale}")
    B, H, L, D = key.shape
    Cq, Ck = query_centroids.shape[2], key_centroids.shape[2]
    output_error = routing == "output_error"
    queries, keys, values = (x.to(key.dtype) for x in (query_centroids, key_centroids, value_centroids))
    why_not = why_not_hopper(capability(key.device), key.dtype, D, variable, version())
    if output_error and config is None and not why_not:
        from . import hopper

        error, gap, parts = hopper.probe(queries, key, value, key_offsets, keys, scale)
        return RowScores(error[..., :Cq].mT, None, gap[..., :Cq].mT, parts)
    c = config or probe_config_for(capability(key.device), D, key.dtype)
    options = meta(c, D, key.dtype, variable, output_error)
    runs, lines = triton.cdiv(Ck, options["BLOCKS"]), triton.cdiv(Cq, 32) * 32

    def scores() -> Tensor:
        return key.new_empty((B, H, Ck, lines), dtype=torch.float32)

    error, gap, mass = scores(), scores(), None if output_error else scores()
    parts = key.new_empty((B, H, runs, Cq), dtype=torch.float32)
    second = value
    if not output_error:
        second = key.new_empty((B, H, L, 2), dtype=torch.float32)
        spread_kernel[(Ck, B * H)](value, key_offsets, values, second, L, Ck, **spread_meta(D))
    tiles = [key, second]
    if options["TMA"]:
        tiles[0] = descriptor(key, BLOCK_N, options["BLOCK_D"])
        if output_error:
            tiles[1] = descriptor(value, BLOCK_N, options["BLOCK_D"])
    probe_kernel[(triton.cdiv(Cq, options["BLOCK_M"]), runs, B * H)](
        queries, *tiles, key_offsets, keys, values, error, gap, mass, parts, scale, L, Cq, Ck, lines,
        **options,
    )  # fmt: skip
    error, gap = error[..., :Cq].mT, gap[..., :Cq].mT
    return RowScores(error, None if mass is None else mass[..., :Cq].mT, gap, parts)


def meta(c: Config, head_dim: int, dtype: torch.dtype, variable: bool, output_error: bool) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_M": c.block_m,
        "BLOCK_N": BLOCK_N, "BLOCKS": BLOCKS_PER_PROGRAM, "ONE_TILE": not variable, "OUTPUT_ERROR": output_error,
        "TMA": c.tma, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": c.num_warps, "num_stages": c.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def spread_meta(head_dim: int) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "ROWS": 64,
        "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
