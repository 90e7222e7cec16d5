"""The four ops that a rewritten graph calls.

A site can be three calls, so that a reader of the graph sees what happens:

    plan = svg_ear::clustered_permute(query, key, value, ...)       cluster, permute, probe, route
    out, lse = svg_ear::sparse_exact(query, ..., plan)              the kept blocks, exactly
    out = svg_ear::centroid_compensation(query, out, lse, plan)     the skipped blocks, by their centroids

or one, by default: svg_ear::attention. Each op asks the context of the running call whether its site is dense
at this step. If it is, the op computes what the model asked for: scaled_dot_product_attention.

Every query, key, value and output is [B, H, L, D]. Outputs are [B, L, H, D] in memory, because every model
goes on with out.transpose(1, 2).flatten(2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import context, planning
from .attention import first_order
from .constants import SiteConstants
from .dense import dense_attention, dense_keys, drop_noop_mask, like_output
from .dispatch import kernels_for
from .fallback import is_dense, sparse_or_dense
from .measuring.calls import measure_call, measure_dense, try_forms
from .plan import SparsePlan, empty_plan

# Decisions and carried centroids are read in Python at every call. A CUDA graph must not record one call's choice, so
# graphs are cut around the ops. The kernels read any strides, so Inductor has to keep only their order. (By default a
# custom op gets exactly eager's strides, which would cost copies.)
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)

_QKV = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
_CONSTANTS = (
    "float? scale, SymInt num_text, bool text_first, SymInt[] grid, str order, str routing, "
    "bool compensate, float? density, int seed, int site, int min_tokens=0, int min_frames=0, "
    "int shards=1, bool host=False, bool packed=False"
)
_PLAN = (
    "Tensor key_p, Tensor value_p, Tensor query_order, Tensor query_offsets, Tensor key_order, "
    "Tensor key_offsets, Tensor key_centroids, Tensor value_centroids, Tensor bias, Tensor kept_count, "
    "Tensor kept_blocks, Tensor query_centroids"
)


def _unpack(plan_and_constants: tuple[Any, ...]) -> tuple[SparsePlan, SiteConstants]:
    n = len(SparsePlan._fields)
    return SparsePlan(*plan_and_constants[:n]), SiteConstants(*plan_and_constants[n:])


def _checked(out: Tensor, query: Tensor) -> Tensor:
    """The output of a kernel. Raises if it is not what the fakes promise: Inductor relies on that."""
    _, H, L, D = query.shape
    if (out.shape, out.stride(), out.dtype) != (query.shape, (H * L * D, D, H * D, 1), query.dtype):
        raise RuntimeError(f"a kernel returned {out.dtype} {[*out.shape]} for {query.dtype} {[*query.shape]}")
    return out


def _dense(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants) -> Tensor:
    """Dense attention. Measures what sparse calls would have lost, if the host asked for that."""
    out = dense_attention(query, *dense_keys(key, value, attn_mask, c.site), c.scale)
    measure_dense(out, c, partial(try_forms, query, key, value, attn_mask, c))
    return out


@torch.library.custom_op(
    "svg_ear::clustered_permute",
    mutates_args=(),
    schema=f"({_QKV}, {_CONSTANTS}) -> ({', '.join(['Tensor'] * len(SparsePlan._fields))})",
    tags=_TAGS,
)
def clustered_permute(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any
) -> SparsePlan:
    """The plan of one call (kernels/plan.py). In a dense call its tensors are uninitialised, and unused."""
    c = SiteConstants(*constants)

    def sparse() -> SparsePlan:
        plan = planning.make_plan(query, key, value, drop_noop_mask(attn_mask, c.site), c)
        # Clones of what the context remembers: Inductor may reuse the memory of the plan.
        shared = ("query_order", "query_offsets", "key_order", "key_offsets")
        return plan._replace(**{name: getattr(plan, name).clone() for name in shared})

    return sparse_or_dense(query, c, sparse, lambda: empty_plan(query, c.num_text, c.order), alone=False)


@clustered_permute.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> SparsePlan:
    c = SiteConstants(*constants)
    return empty_plan(query, c.num_text, c.order)


@torch.library.custom_op(
    "svg_ear::sparse_exact",
    mutates_args=(),
    schema=f"({_QKV}, {_PLAN}, {_CONSTANTS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
def sparse_exact(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *plan_and_constants: Any
) -> tuple[Tensor, Tensor]:
    """Softmax over the kept key blocks alone: (out [B,H,L,D], lse [B,H,L] float32), in token order.

    lse_q = log sum_{j kept} sum_{t in j} exp(s_t),  out_q = sum_{j kept} sum_{t in j} exp(s_t - lse_q) v_t

    A query with no kept block has out 0 and lse -inf. In a dense call: dense attention, and lse unspecified.
    """
    plan, c = _unpack(plan_and_constants)

    def sparse() -> tuple[Tensor, Tensor]:
        out = like_output(query)
        out, lse = kernels_for(query).attention.sparse_exact(query, plan, c.scale_of(query), out, c.variable)
        return _checked(out, query), lse

    def dense() -> tuple[Tensor, Tensor]:
        out = _dense(query, key, value, attn_mask, c)
        return out, query.new_empty(query.shape[:-1], dtype=torch.float32)

    return sparse_or_dense(query, c, sparse, dense, alone=False)


@sparse_exact.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return like_output(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "svg_ear::centroid_compensation",
    mutates_args=(),
    schema=f"(Tensor query, Tensor out, Tensor lse, {_PLAN}, {_CONSTANTS}) -> Tensor",
    tags=_TAGS,
)
def centroid_compensation(query: Tensor, out: Tensor, lse: Tensor, *plan_and_constants: Any) -> Tensor:
    """Adds the skipped blocks to an exact part: one joint softmax over kept tokens and centroids.

    With w_j = exp(s(q, kc_j) + bias_ij):  (exp(lse) out + sum_j w_j vc_j) / (exp(lse) + sum_j w_j)

    In a dense call: a copy of out. Where it fails: dense attention over the plan's own keys, since the order
    of keys does not matter.
    """
    plan, c = _unpack(plan_and_constants)
    out_is_dense = is_dense(query, c)

    def keys() -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.arange(query.shape[2], device=query.device)
        return plan.key, plan.value, (slots < plan.key_offsets[..., -1:])[:, :, None, :]

    def sparse() -> Tensor:
        merged = like_output(query)
        merged = kernels_for(query).attention.centroid_compensation(
            query, out, lse, plan, c.scale_of(query), merged, c.variable
        )
        measure_call(query, keys, _checked(merged, query), plan.query_order, c)
        return merged

    def dense() -> Tensor:
        if out_is_dense:
            return like_output(query).copy_(out)
        return dense_attention(query, *keys(), c.scale)

    return sparse_or_dense(query, c, sparse, dense)


@centroid_compensation.register_fake
def _(query: Tensor, out: Tensor, lse: Tensor, *_: Any) -> Tensor:
    return like_output(query)


@torch.library.custom_op(
    "svg_ear::attention", mutates_args=(), schema=f"({_QKV}, {_CONSTANTS}) -> Tensor", tags=_TAGS
)
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Tensor:
    """The three ops in one call; dense attention in a dense call."""
    decisions = context.current().decisions
    c = decisions.constants(constants)

    def sparse() -> Tensor:
        mask = drop_noop_mask(attn_mask, c.site)
        plan = planning.make_plan(query, key, value, mask, c)
        out = like_output(query)
        if c.variable and not c.compensate:  # no centroid counts, so none need be read
            out, _ = kernels_for(query).attention.sparse_exact(query, plan, c.scale_of(query), out)
        else:
            named = decisions.of(c).first_order
            chosen = (True,) * query.shape[1] if named is None else named
            out = first_order.attend(query, plan, c.scale_of(query), out, c.variable, chosen)
        query_order = plan.query_order
        del plan  # a trial makes others, as large as this one
        keys = partial(dense_keys, key, value, attn_mask, c.site)
        trial = partial(try_forms, query, key, value, attn_mask, c)
        measure_call(query, keys, _checked(out, query), query_order, c, trial)
        return out

    return sparse_or_dense(query, c, sparse, lambda: _dense(query, key, value, attn_mask, c))


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> Tensor:
    return like_output(query)
