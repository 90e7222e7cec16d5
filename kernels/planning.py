"""How is the plan of one call made? Clusters, permutes, probes and routes."""

from __future__ import annotations

import math

from torch import Tensor

from . import capture, cluster, context
from .constants import SiteConstants
from .dispatch import kernels_for
from .plan import KEY_BLOCK, QUERY_BLOCK, Plan, block_counts


def make_plan(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants) -> Plan:
    """The plan of one call; what clustering carries over lies in the running call's context.

    attn_mask: [B or 1, 1, 1, L] bool, True where a key may be seen, or None.
    """
    call = context.current()
    B, H, L, _ = query.shape
    valid = None if attn_mask is None else attn_mask[:, 0, 0, :].expand(B, L)
    (vq, tq), (vk, tk) = block_counts(L, c.num_text, c.order)
    grid = tuple(c.grid) or call.grid
    if grid is not None and math.prod(grid) != L - c.num_text:
        grid = None
    recorded = capture.is_recorded(query)
    carried = (None, None) if recorded else call.carried.get(c.site, (None, None))
    split_heads = call.split_heads.get(c.site, ())
    arrange = (c.num_text, c.text_first, c.order, grid, c.seed, split_heads, call.remember)
    queries, query_state = cluster.make_blocks(query, None, (vq, tq), QUERY_BLOCK, carried[0], *arrange)
    keys, key_state = cluster.make_blocks(key, valid, (vk, tk), KEY_BLOCK, carried[1], *arrange)
    if query_state is not None and key_state is not None and not recorded:
        call.carried[c.site] = (query_state, key_state)

    kernels = kernels_for(query)
    key_p, value_p, key_centroids, value_centroids = kernels.permute.gather_with_means(
        key, value, keys.order, keys.offsets, valid is not None
    )
    density = call.density.get(c.site, c.density)
    query_centroids = kernels.permute.gathered_means(query, queries.order, queries.offsets)
    scores = kernels.probe.probe(
        query_centroids,
        key_p,
        value_p,
        keys.offsets,
        key_centroids,
        value_centroids,
        c.scale_of(query),
        c.routing,
        largest_block=None if c.order == "kmeans" else KEY_BLOCK,
        with_mass=c.routing == "svg_ear" or density is None,
    )
    routed = kernels.route.select(
        scores, queries.offsets, keys.offsets, (vq, vk), c.routing, density, c.compensate
    )
    if call.totals is not None:
        call.totals.setdefault(c.site, context.SiteTotals()).add(routed.areas, B * H * (L - c.num_text) ** 2)
    plan = Plan(
        key_p, value_p, queries.order, queries.offsets, keys.order, keys.offsets,
        key_centroids.to(query.dtype), value_centroids.to(query.dtype),
        routed.bias, routed.kept_count, routed.kept_blocks, query_centroids.to(query.dtype),
    )  # fmt: skip
    return _checked_plan(plan, query, c)


def _checked_plan(plan: Plan, query: Tensor, c: SiteConstants) -> Plan:
    """A plan, if its tensors have their shapes: the kernels do not look before they read."""
    B, H, L, D = query.shape
    (vq, tq), (vk, tk) = block_counts(L, c.num_text, c.order)
    Cq, Ck = vq + tq, vk + tk
    sizes = (
        (L, D), (L, D), (L,), (Cq + 1,), (L,), (Ck + 1,),
        (Ck, D), (Ck, D), (Cq, Ck), (Cq,), (Cq, Ck), (Cq, D),
    )  # fmt: skip
    for name, tensor, size in zip(plan._fields, plan, sizes, strict=True):
        if tensor.shape != (B, H, *size):
            raise RuntimeError(f"{name} of a plan is {[*tensor.shape]}, not {[B, H, *size]}")
    return plan
