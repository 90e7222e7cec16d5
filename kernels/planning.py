"""How is the plan of one call made? Tokens are put into blocks, blocks are probed, and a budget is spent.

Only the last of the three steps depends on the density, so a trial of several densities shares the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import capture, context
from .blocks import cluster
from .blocks.cluster import Blocks
from .blocks.places import Grid, Places, of_shards
from .constants import OWN_CALL, SiteConstants
from .dispatch import kernels_for
from .plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan, block_counts, plan_shapes


class Arranged(NamedTuple):
    """Tokens in blocks. key, value [B,H,L,D] in block order, centroids [B,H,C,D]: the means of blocks."""

    queries: Blocks
    keys: Blocks
    key: Tensor
    value: Tensor
    query_centroids: Tensor
    key_centroids: Tensor
    value_centroids: Tensor


def make_plan(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants
) -> SparsePlan:
    """The plan of one call. Its density, and what clustering kept from earlier calls, come from the context.

    attn_mask: [B or 1, 1, 1, L] bool, True where a key may be seen, or None.
    """
    call = context.current()
    blocks = arrange(query, key, value, attn_mask, c)
    plan, areas = route(blocks, probe(blocks, c), c, call.decisions.of(c).density)
    if not capture.is_recorded(query):  # replays would not be counted
        B, H, L, _ = query.shape
        call.results.totals.setdefault(c.site, context.SiteTotals()).add(areas, B * H * (L - c.num_text) ** 2)
    return plan


def arrange(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, c: SiteConstants
) -> Arranged:
    """The blocks of a call, and its keys and values in their order."""
    call = context.current()
    B, _, L, _ = query.shape
    valid = None if attn_mask is None else attn_mask[:, 0, 0, :].expand(B, L)
    of_queries, of_keys = block_counts(L, c.num_text, c.order)
    grids, places = _grids_and_places(call, c, L, query.device)
    alone = capture.is_recorded(query) or c.site == OWN_CALL
    carried = (None, None) if alone else call.memo.carried.get(c.site, (None, None))
    split_heads = call.decisions.of(c).split_heads
    how = (c.num_text, c.text_first, c.order, grids, c.seed, split_heads, call.memo.remember, places)
    queries, query_state = cluster.make_blocks(query, None, of_queries, QUERY_BLOCK, carried[0], *how)
    keys, key_state = cluster.make_blocks(key, valid, of_keys, KEY_BLOCK, carried[1], *how)
    if query_state is not None and key_state is not None and not alone:
        call.memo.carried[c.site] = (query_state, key_state)

    permute = kernels_for(query).permute
    most_queries, most_keys = (None, None) if c.variable else (QUERY_BLOCK, KEY_BLOCK)
    key_p, value_p, key_centroids, value_centroids = permute.gather_with_means(
        key, value, keys.order, keys.offsets, valid is not None, most_keys
    )
    query_centroids = permute.gathered_means(query, queries.order, queries.offsets, most=most_queries)
    return Arranged(queries, keys, key_p, value_p, query_centroids, key_centroids, value_centroids)


def _grids_and_places(
    call: context.RunContext, c: SiteConstants, length: int, device: torch.device
) -> tuple[tuple[Grid, ...], Places | None]:
    """The frame grids of the video tokens, () if they form none, and where tokens lie, if not in one stretch each."""
    decisions, remember = call.decisions, call.memo.remember
    packed, places = decisions.packed if c.packed else None, None
    if packed is not None:
        return packed.grids, remember(device, ("packed", packed.places.name), lambda: packed.on(device))
    if c.shards > 1 and c.num_text > 0:
        name = ("places", length, c.num_text, c.text_first, c.shards)
        places = remember(device, name, lambda: of_shards(length, c, device))
    frames, height, width = c.grid or decisions.grid or (0, 0, 0)
    fits = frames * height * width == length - c.num_text
    return ((frames, height, width),) if fits and frames else (), places


def probe(blocks: Arranged, c: SiteConstants) -> Any:
    """The scores of all pairs of blocks, as the routing of this device takes them."""
    return kernels_for(blocks.key).probe.probe(
        blocks.query_centroids,
        blocks.key,
        blocks.value,
        blocks.keys.offsets,
        blocks.key_centroids,
        blocks.value_centroids,
        c.scale_of(blocks.key),
        c.routing,
        c.variable,
    )


def route(
    blocks: Arranged, scores: Any, c: SiteConstants, density: float | None
) -> tuple[SparsePlan, Tensor]:
    """The plan for this density, and the areas of what it computes exactly (kernels/routing/torch.py)."""
    length, dtype = blocks.key.shape[2], blocks.key.dtype
    (video_queries, _), (video_keys, _) = block_counts(length, c.num_text, c.order)
    routed = kernels_for(blocks.key).route.select(
        scores, blocks.queries.offsets, blocks.keys.offsets, (video_queries, video_keys), c.routing, density,
        c.compensate,
    )  # fmt: skip
    plan = SparsePlan(
        blocks.key, blocks.value, *blocks.queries, *blocks.keys,
        blocks.key_centroids.to(dtype), blocks.value_centroids.to(dtype),
        routed.bias, routed.kept_count, routed.kept_blocks, blocks.query_centroids.to(dtype),
    )  # fmt: skip
    return _checked_plan(plan, c), routed.areas


def _checked_plan(plan: SparsePlan, c: SiteConstants) -> SparsePlan:
    """A plan, if its tensors have their shapes: the kernels do not look before they read."""
    shapes = plan_shapes(plan.key, c.num_text, c.order)
    for name, tensor, shape in zip(plan._fields, plan, shapes, strict=True):
        if tensor.shape != shape:
            raise RuntimeError(f"{name} of a plan is {[*tensor.shape]}, not {[*shape]}")
    return plan
