"""How does a graph call the ops instead of attention? In place, in a copy of the graph.

    out = svg_ear.attention(query, key, value, mask, *constants)

or, without the setting `merge`, in three steps:

    plan = svg_ear.clustered_permute(query, key, value, mask, *constants)
    out, lse = svg_ear.sparse_exact(query, key, value, mask, *plan, *constants)
    out = svg_ear.centroid_compensation(query, out, lse, *plan, *constants)

Each site is replaced exactly where it stands: Dynamo's graphs are not functional (rotary embeddings are
written into the query by setitem), so nothing may move across anything else. The graph module itself is
never copied: deep copies lose the `_dynamo_source` of placeholders, by which Inductor knows which inputs
are weights. The caller sets `gm.graph = rewrite(...)` and recompiles.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from svg_ear_compile.kernels import ops
from svg_ear_compile.settings import Settings

from .fx_utils import copy_graph, remove_unused
from .match import AttentionNode, match
from .site import Site
from .sizes import Extent, example, hint


def rewrite(gm: fx.GraphModule, sites: Sequence[Site], settings: Settings) -> fx.Graph:
    """A copy of gm's graph in which every site with a verdict to rewrite calls our ops."""
    graph, copies = copy_graph(gm.graph)
    calls = {call.node: call for call in match(gm.graph).calls}
    sizes: dict[tuple[fx.Node, int], fx.Node | int] = {}
    for site in sites:
        if site.verdict.rewrite:
            call = _copied(calls[site.node], copies)
            _replace(graph, call, site, settings, copies, sizes)
    graph.lint()
    return graph


def _copied(call: AttentionNode, copies: dict[fx.Node, fx.Node]) -> AttentionNode:
    """The same call in the copy."""
    nodes: dict[str, Any] = {k: copies[v] for k, v in vars(call).items() if isinstance(v, fx.Node)}
    return replace(call, **nodes)


def _replace(
    graph: fx.Graph,
    call: AttentionNode,
    site: Site,
    settings: Settings,
    copies: dict[fx.Node, fx.Node],
    sizes: dict[tuple[fx.Node, int], fx.Node | int],
) -> None:
    svg_ear = torch.ops.svg_ear
    out_value = example(call.node)
    with graph.inserting_before(call.node):

        def length(value: int | Extent) -> Any:
            return value if isinstance(value, int) else _extent(graph, value, copies, sizes)

        def add(target: Any, args: tuple[Any, ...], value: Any = None) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta = {k: v for k, v in call.node.meta.items() if k != "example_value"}
            if value is not None:
                node.meta["example_value"] = value
            return node

        def operand(node: fx.Node) -> fx.Node:
            """Under autocast SDPA casts its operands; our ops do not."""
            x = example(node)
            if x.dtype == out_value.dtype:
                return node
            return _method(graph, "to", node, out_value.dtype, value=x.to(out_value.dtype))

        constants = ops.SiteConstants(
            host=True,
            scale=None if call.scale is None else float(call.scale),
            num_text=length(site.layout.num_text),
            text_first=site.layout.text_first,
            grid=[length(n) for n in site.layout.grid or ()],
            order=settings.order,
            routing=settings.routing,
            compensate=settings.compensate,
            density=settings.density,
            seed=settings.seed,
            site=site.index,
            min_tokens=site.min_tokens,
            min_frames=site.min_frames,
            shards=site.layout.shards,
            packed=site.layout.packed is not None,
        )
        mask = None if site.key_mask is None else _key_row(graph, copies[site.key_mask.node])
        qkv = (operand(call.query), operand(call.key), operand(call.value), mask)
        value = ops.like_output(out_value)
        if settings.merge or site.layout.packed:  # the shapes of its plan are not known to the graph
            result = add(svg_ear.attention.default, (*qkv, *constants), value)
        else:
            plan_op = add(svg_ear.clustered_permute.default, (*qkv, *constants))
            plan = [add(operator.getitem, (plan_op, i)) for i in range(len(ops.SparsePlan._fields))]
            exact = add(svg_ear.sparse_exact.default, (*qkv, *plan, *constants))
            out = add(operator.getitem, (exact, 0), value)
            sums = out_value.new_empty(out_value.shape[:-1], dtype=torch.float32)
            lse = add(operator.getitem, (exact, 1), sums)
            args = (qkv[0], out, lse, *plan, *constants)
            result = add(svg_ear.centroid_compensation.default, args, value)
        if mask is not None and site.key_mask is not None and site.key_mask.zero_rows:
            rows = _method(graph, "transpose", mask, 2, 3, value=example(mask).transpose(2, 3))
            result = add(torch.where, (rows, result, 0.0), value)
        if lies_by_head(out_value):
            # Attention over contiguous operands answers contiguously, and a view may rely on that.
            result = _method(graph, "contiguous", result, value=out_value)
    call.node.replace_all_uses_with(result)
    remove_unused(graph, call.node)


def _key_row(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A bool tensor [B or 1, (1, (1,)) S] as [B or 1, 1, 1, S]."""
    while example(node).dim() < 4:
        node = _method(graph, "unsqueeze", node, 1, value=example(node).unsqueeze(1))
    return node


def lies_by_head(out: torch.Tensor) -> bool:
    """Whether [B,H,L,D] lies as such in memory, and not as [B,L,H,D] like the output of our ops."""
    return (hint(out.stride(1)) or 0) > (hint(out.stride(2)) or 0)


def _extent(
    graph: fx.Graph,
    extent: Extent,
    copies: dict[fx.Node, fx.Node],
    sizes: dict[tuple[fx.Node, int], fx.Node | int],
) -> Any:
    """The graph's expression for a length: sizes of nodes, their products, and their sum."""

    def size(node: fx.Node, dim: int) -> fx.Node | int:
        value = example(node).shape[dim]
        if isinstance(value, int):
            return value
        if (node, dim) not in sizes:
            sizes[node, dim] = _method(graph, "size", copies[node], dim, value=value)
        return sizes[node, dim]

    total: Any = extent.constant
    for term in extent.terms:
        product: Any = 1
        for node, dim in term:
            product = _combine(graph, operator.mul, product, size(node, dim))
        total = _combine(graph, operator.add, total, product)
    return total


def _combine(graph: fx.Graph, operation: Any, a: Any, b: Any) -> Any:
    neutral = 1 if operation is operator.mul else 0
    if a is neutral or b is neutral:
        return b if a is neutral else a
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        return operation(a, b)
    node = graph.call_function(operation, (a, b))
    node.meta["example_value"] = operation(*(example(x) if isinstance(x, fx.Node) else x for x in (a, b)))
    return node


def _method(graph: fx.Graph, name: str, *args: Any, value: Any) -> fx.Node:
    node = graph.call_method(name, args)
    node.meta["example_value"] = value
    return node
