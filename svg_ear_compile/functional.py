"""SVG-EAR attention as a function, for those who do not compile.

`svg_ear_compile.attention` is this file's function. The file is not called attention.py because a submodule of that
name would take the function's place in the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .kernels import ops, planning, reference
from .kernels.constants import OWN_CALL, SiteConstants

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int] | None = None,
    num_text: int = 0,
    density: float = 0.25,
    mask: Tensor | None = None,
    impl: Literal["torch", "reference"] | None = None,
) -> Tensor:
    """Block-sparse attention with centroids in place of the skipped blocks (SVG-EAR, arXiv 2603.08982).

    Tokens are grouped into blocks of neighbours. For each block of queries the key blocks with the largest error per
    cost are computed exactly; every other key block j, of n_j keys with the means kc_j and vc_j, is one more entry of
    the same softmax. For a query q, with s(q, k) = q.k / sqrt(head_dim):

        num(q) = sum_{j exact} sum_{t in j} exp(s(q, k_t)) v_t + sum_{j skipped} exp(s(q, kc_j) + b_j) vc_j
        den(q) = sum_{j exact} sum_{t in j} exp(s(q, k_t))     + sum_{j skipped} exp(s(q, kc_j) + b_j)
        out(q) = num(q) / den(q)

    (the paper's linear compensation branch). b_j is log n_j, plus an estimate of what the spread of the keys around
    their mean adds (kernels/plan.py). With density 1 no block is skipped, and this is scaled_dot_product_attention.

    query, key, value: [B, H, L, D], float32, float16 or bfloat16, all of one shape, dtype and device; D from 16 to 256.
    grid: (frames, height, width) of the video tokens, in row-major order; blocks are then boxes of the video. None:
        blocks are found from the tokens themselves, which takes longer.
    num_text: how many of the L tokens are text; they come last and are always computed exactly.
    density: the share of the video query-key pairs that is computed exactly, 0 < density <= 1.
    mask: [B or 1, 1, 1, L] bool, True for keys that may be attended to; None: all of them.
    impl: None: Triton on a CUDA GPU, PyTorch elsewhere. "torch": PyTorch, on a CPU only. "reference": the formula over
        whole [L, L] matrices in float64; slow, for comparing.

    Returns [B, H, L, D] in the dtype of query; in memory it is [B, L, H, D]. Works under torch.compile, "reference"
    excepted. Gradients are not supported. Should a kernel fail, the call warns and is dense. Raises ValueError for
    arguments that do not fit.
    """
    _check(query, key, value, grid, num_text, density, mask)
    if impl not in (None, "torch", "reference"):
        raise ValueError(f"impl is {impl!r}: pass None, 'torch' or 'reference'")
    if impl == "torch" and query.device.type != "cpu":
        raise ValueError(
            f"impl='torch' runs on a CPU, not on {query.device}: leave impl out, or move the tensors"
        )
    constants = SiteConstants(
        scale=None, num_text=num_text, text_first=False, grid=list(grid or ()), order="auto",
        routing="output_error", compensate=True, density=float(density), seed=0, site=OWN_CALL,
    )  # fmt: skip
    if impl == "reference":
        plan = planning.make_plan(query, key, value, mask, constants)
        return ops.like_output(query).copy_(reference.joint_softmax(query, plan, constants.scale_of(query)))
    out: Tensor = ops.attention(query, key, value, mask, *constants)
    return out


def _check(
    query: Tensor, key: Tensor, value: Tensor, grid: Sequence[int] | None, num_text: int, density: float,
    mask: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError, with what to do about it, if the arguments of `attention` do not fit together."""
    operands = (query, key, value)
    if query.dim() != 4 or query.shape != key.shape or query.shape != value.shape:
        shapes = ", ".join(str([*x.shape]) for x in operands)
        raise ValueError(
            f"query, key and value must all be [batch, heads, tokens, head_dim], not {shapes}: this is self attention; "
            "for cross attention use torch.nn.functional.scaled_dot_product_attention"
        )
    if any(x.dtype != query.dtype or x.device != query.device for x in operands) or query.dtype not in DTYPES:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in operands)
        raise ValueError(
            f"query, key and value must have one device and one dtype, float32, float16 or bfloat16, not {found}: "
            "cast or move them with .to()"
        )
    _, _, tokens, head_dim = query.shape
    if not 16 <= head_dim <= 256:
        raise ValueError(
            f"head_dim is {head_dim}: 16 to 256 is supported; pad query, key and value with zeros"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        raise ValueError(
            "gradients are not supported: call it under torch.no_grad() or torch.inference_mode()"
        )
    if not 0 <= num_text <= tokens:
        raise ValueError(
            f"num_text is {num_text} of {tokens} tokens: pass the number of text tokens, which come last"
        )
    if grid is not None and (len(grid) != 3 or math.prod(grid) + num_text != tokens):
        raise ValueError(
            f"grid {tuple(grid)} and num_text {num_text} make {math.prod(grid) + num_text} tokens, not {tokens}: "
            "pass grid=(frames, height, width) in tokens, after patching, or leave it out"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: pass a share above 0, and at most 1")
    if mask is not None:
        fits = mask.dim() == 4 and mask.shape[0] in (1, query.shape[0]) and mask.shape[1:] == (1, 1, tokens)
        if not fits or mask.dtype != torch.bool or mask.device != query.device:
            raise ValueError(
                f"mask is {mask.dtype} {[*mask.shape]} on {mask.device}: pass bool [batch or 1, 1, 1, {tokens}] on "
                f"{query.device}, True for keys that may be attended to"
            )
