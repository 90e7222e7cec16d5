"""The four ops that a rewritten graph calls.

A site is three calls, so that a reader of the graph sees what happens:

    plan = svg_ear::clustered_permute(query, key, value, ...)       cluster, permute, probe, route
    out, lse = svg_ear::sparse_exact(query, ..., plan)              the kept blocks, exactly
    out = svg_ear::centroid_compensation(query, out, lse, plan)     the skipped blocks, by their centroids

or, merged (the default), one: svg_ear::attention. All of them ask the context of the running call whether
their site is dense at this step; then attention is what the model asked for, scaled_dot_product_attention.

Layout of every query, key, value and output: [B, H, L, D]. Outputs are [B, L, H, D] in memory, because
every model goes on with out.transpose(1, 2).flatten(2).
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as cpu_kernels
from . import cluster, context, permute, probe, route
from .plan import Plan, block_counts, empty_plan

# Decisions and carried centroids are read in Python at every call: a CUDA graph must not record one call's
# choice, so graphs are cut around the ops.
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)


class SiteConstants(NamedTuple):
    """What is fixed for a site when its graph is compiled: the trailing arguments of its ops.

    scale: of the logits, 1/sqrt(head_dim) when None. num_text: text tokens of the sequence, first or last
    in it. grid: (frames, height, width) of the video tokens, or empty. order: how video tokens are put into
    blocks, "auto" (cubes where a grid is known, else splits), "cubes", "splits", "kmeans". routing: which
    blocks are exact, "output_error" (one budget for a batch element) or "svg_ear" (the paper). compensate:
    whether centroids stand for skipped blocks. density: exact video query-key pairs over all of them; None:
    as the routing finds. site: the number of the site in its graph.
    """

    scale: float | None
    num_text: int
    text_first: bool
    grid: list[int]
    order: str
    routing: str
    compensate: bool
    density: float | None
    seed: int
    site: int


_QKV = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask"
_CONSTANTS = (
    "float? scale, SymInt num_text, bool text_first, SymInt[] grid, str order, str routing, "
    "bool compensate, float? density, int seed, int site"
)
_PLAN = (
    "Tensor key_p, Tensor value_p, Tensor query_order, Tensor query_offsets, Tensor key_order, "
    "Tensor key_offsets, Tensor key_centroids, Tensor value_centroids, Tensor bias, Tensor kept_count, "
    "Tensor kept_blocks"
)


def like_output(query: Tensor) -> Tensor:
    """An uninitialised [B,H,L,D] tensor that lies as [B,L,H,D] in memory."""
    B, H, L, D = query.shape
    return query.new_empty((B, L, H, D)).transpose(1, 2)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(query key^T * scale + mask) value, by the call that the model itself made."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    wanted = like_output(query)
    return out if out.stride() == wanted.stride() else wanted.copy_(out)


def _drop_noop_mask(attn_mask: Tensor | None, site: int) -> Tensor | None:
    """None where the mask hides nothing. Reads one bool from the device, once per mask and call of a graph."""
    if attn_mask is None:
        return None
    call = context.current()
    number = call.mask_ids.get(site, site)
    if number not in call.noop_masks:
        if attn_mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return attn_mask
        call.noop_masks[number] = bool(attn_mask.all())
    return None if call.noop_masks[number] else attn_mask


def make_plan(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants) -> Plan:
    """Clusters, permutes, probes and routes one call; carries centroids over in the running call's context.

    attn_mask: [B or 1, 1, 1, L] bool, True where a key may be seen, or None.
    """
    call = context.current()
    B, H, L, D = query.shape
    scale = 1 / math.sqrt(D) if c.scale is None else c.scale
    valid = None if attn_mask is None else attn_mask[:, 0, 0, :].expand(B, L)
    (vq, tq), (vk, tk) = block_counts(L, c.num_text, c.order)
    grid = tuple(c.grid) or call.grid
    if grid is not None and math.prod(grid) != L - c.num_text:
        grid = None
    carried = call.carried.get(c.site, (None, None))
    arrange = (c.num_text, c.text_first, c.order, grid, c.seed)
    queries, query_state = cluster.make_blocks(query, None, (vq, tq), carried[0], *arrange)
    keys, key_state = cluster.make_blocks(key, valid, (vk, tk), carried[1], *arrange)
    if query_state is not None and key_state is not None:
        call.carried[c.site] = (query_state, key_state)

    key_p, value_p = (permute.gather(x, keys.order, keys.offsets) for x in (key, value))
    key_centroids, value_centroids = (permute.block_means(x, keys.offsets) for x in (key_p, value_p))
    query_centroids = permute.block_means(permute.gather(query, queries.order, queries.offsets), queries.offsets)
    query_sizes, key_sizes = queries.offsets.diff(dim=-1), keys.offsets.diff(dim=-1)

    scores = probe.probe(
        query_centroids, key_p, value_p, keys.offsets, key_centroids, value_centroids, scale, c.routing
    )
    kept = route.route(scores, query_sizes, key_sizes, vq, vk, c.routing, c.density)
    bias = route.centroid_bias(scores, kept, key_sizes, c.routing, c.compensate)
    count, blocks = route.kept_lists(kept)
    exact, executed = route.areas(kept[:, :, :vq, :vk], query_sizes[..., :vq], key_sizes[..., :vk])
    call.totals.setdefault(c.site, context.SiteTotals()).add(exact, executed, B * H * (L - c.num_text) ** 2)
    return Plan(
        key_p, value_p, queries.order, queries.offsets, keys.order, keys.offsets,
        key_centroids.to(query.dtype), value_centroids.to(query.dtype), bias, count, blocks,
    )  # fmt: skip


def _kernels(query: Tensor) -> ModuleType:
    """sparse_exact, centroid_compensation and attend for the query's device: Triton on CUDA, else PyTorch."""
    if query.is_cuda:
        from . import triton_attention

        return triton_attention
    return cpu_kernels


def _scale(query: Tensor, c: SiteConstants) -> float:
    return 1 / math.sqrt(query.shape[-1]) if c.scale is None else c.scale


def _is_dense(c: SiteConstants) -> bool:
    return c.site in context.current().dense


def _give_up(error: Exception, c: SiteConstants) -> None:
    """Marks the site dense for the rest of this call, counts and warns; re-raises what must not be hidden."""
    call = context.current()
    # After a CUDA error every further call fails too: falling back would only hide where it came from.
    if call.strict or isinstance(error, torch.AcceleratorError):
        raise error
    call.dense[c.site] = f"failed: {type(error).__name__}"
    call.counters[f"fallback: {type(error).__name__}"] += 1
    warnings.warn(f"svg_ear: attention site {c.site} ran dense because of {error!r}", RuntimeWarning, stacklevel=2)


@torch.library.custom_op(
    "svg_ear::clustered_permute",
    mutates_args=(),
    schema=f"({_QKV}, {_CONSTANTS}) -> ({', '.join(['Tensor'] * len(Plan._fields))})",
    tags=_TAGS,
)
def clustered_permute(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Plan:
    """The plan of one call (kernels/plan.py). In a dense call its tensors are uninitialised and unused."""
    c = SiteConstants(*constants)
    if not _is_dense(c):
        try:
            return make_plan(query, key, value, _drop_noop_mask(attn_mask, c.site), c)
        except Exception as error:  # noqa: BLE001 - whatever it was, dense attention is still right
            _give_up(error, c)
    return empty_plan(query, c.num_text, c.order)


@clustered_permute.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Plan:
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

    out_q = sum_{j kept} sum_{t in j} exp(s_t) v_t / exp(lse_q),  lse_q = log sum_{j kept} sum_{t in j} exp(s_t)

    A query with no kept block has out 0 and lse -inf. In a dense call: dense attention, and lse unspecified.
    """
    plan, c = _unpack(plan_and_constants)
    if not _is_dense(c):
        try:
            return _kernels(query).sparse_exact(query, plan, _scale(query, c), like_output(query))
        except Exception as error:  # noqa: BLE001
            _give_up(error, c)
    out = dense_attention(query, key, value, _drop_noop_mask(attn_mask, c.site), c.scale)
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


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
    """
    plan, c = _unpack(plan_and_constants)
    if _is_dense(c):
        return like_output(query).copy_(out)
    return _kernels(query).centroid_compensation(query, out, lse, plan, _scale(query, c), like_output(query))


@centroid_compensation.register_fake
def _(query: Tensor, out: Tensor, lse: Tensor, *_: Any) -> Tensor:
    return like_output(query)


def _unpack(plan_and_constants: tuple[Any, ...]) -> tuple[Plan, SiteConstants]:
    n = len(Plan._fields)
    return Plan(*plan_and_constants[:n]), SiteConstants(*plan_and_constants[n:])


@torch.library.custom_op(
    "svg_ear::attention", mutates_args=(), schema=f"({_QKV}, {_CONSTANTS}) -> Tensor", tags=_TAGS
)
def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *constants: Any) -> Tensor:
    """clustered_permute, sparse_exact and centroid_compensation in one call; dense attention in a dense call."""
    c = SiteConstants(*constants)
    attn_mask = _drop_noop_mask(attn_mask, c.site)
    if not _is_dense(c):
        try:
            plan = make_plan(query, key, value, attn_mask, c)
            return _kernels(query).attend(query, plan, _scale(query, c), like_output(query))
        except Exception as error:  # noqa: BLE001
            _give_up(error, c)
    return dense_attention(query, key, value, attn_mask, c.scale)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *_: Any) -> Tensor:
    return like_output(query)
