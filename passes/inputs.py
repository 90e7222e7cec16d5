"""Which arguments of the compiled graph does the host look at before a call?

Rotary tables may show the frame grid. What an attention mask hides is read again only when the arguments that it is
computed from change. Positions count the graph's placeholders, which are the arguments of the compiled callable. Under
dynamic shapes there are SymInts among them, so a fixed position would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from svg_ear_compile.compat import storage_key, writes_in_place

from .evidence import rotary_placeholders
from .fx_utils import is_in_place, op_name
from .site import GraphInputs, Site
from .sizes import example, hint

_NO_FUNCTION = re.compile(r"rand|bernoulli|dropout|multinomial|normal|poisson|exponential|empty")


def read_inputs(gm: fx.GraphModule, sites: Sequence[Site]) -> GraphInputs:
    """Finds the inputs that the host reads, for the sites that are rewritten."""
    layouts = {site.q_hint - site.layout.text_hint: site.layout for site in sites if site.verdict.rewrite}
    found = tuple(rotary_placeholders(gm.graph, set(layouts)))
    shared = {tokens // layout.shards: layout for tokens, layout in layouts.items() if layout.shards > 1}
    if found or not shared:
        return GraphInputs(rotary=found)
    layout = next(iter(shared.values()))
    return GraphInputs(tuple(rotary_placeholders(gm.graph, set(shared))), layout.shards, layout.shard)


def mask_arguments(mask: fx.Node) -> tuple[int, ...] | None:
    """Positions of the tensors that a mask is computed from, if it is a function of them and of sizes alone.

    None where something in between is random or uninitialised, a buffer (anybody may change it), or may be
    written in place: what is written may come from anywhere. Views share their fake's storage, so aliases are
    seen.
    """
    placeholders = {node: i for i, node in enumerate(mask.graph.find_nodes(op="placeholder"))}
    written = {_storage(target) for node in mask.graph.nodes for target in _written(node)}
    found, seen, queue = set(), {mask}, [mask]
    while queue:
        node = queue.pop()
        value = example(node)
        if isinstance(value, (int, torch.SymInt)) and hint(value) is not None:
            continue  # a size
        if node.op == "get_attr" or _NO_FUNCTION.search(op_name(node)):
            return None
        if isinstance(value, torch.Tensor) and _storage(node) in written:
            return None
        if node in placeholders:
            found.add(placeholders[node])
        queue += [before for before in node.all_input_nodes if before not in seen]
        seen.update(node.all_input_nodes)
    return tuple(sorted(found))


def _written(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation writes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    if writes_in_place(node.target):
        return [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]
    targets = [*node.args[:1]] * is_in_place(node) + [node.kwargs.get("out")]
    return [n for n in targets if isinstance(n, fx.Node) and isinstance(example(n), torch.Tensor)]


def _storage(node: fx.Node) -> Any:
    return storage_key(example(node))
