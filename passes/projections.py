"""Which linear layer made a query? The Parameter it was given tells one layer from another at run time.

All blocks of a model share one graph when blocks are compiled one by one; what differs between calls is the
Parameter objects that are passed in.
"""

from __future__ import annotations

import math
from collections import deque

from torch import fx

from .axes import Axes, axis_size
from .axis_moves import op_name
from .sources import is_weight, source_name

_LINEAR = {"linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "conv1d"}


def query_parameter(query: fx.Node, axes: Axes) -> fx.Node | None:
    """The placeholder of the query projection's weight.

    It is that of the nearest linear layer upstream: the base layer under LoRA, all of it for a fused qkv, and
    the one over the most tokens where text and video have their own.
    """
    writes = _writes(query.graph)
    seen, queue = {query}, deque([query])
    found: list[tuple[bool, int, fx.Node]] = []
    while queue:
        node = queue.popleft()
        weight = _weight(node) if op_name(node) in _LINEAR else None
        if weight is not None:
            tokens = math.prod(axis_size(axis) for axis in axes.of.get(node, ())[:-1])
            found.append(("lora_" not in source_name(weight), tokens, weight))
            continue
        for before in [*node.all_input_nodes, *writes.get(node, ())]:
            if before not in seen:
                seen.add(before)
                queue.append(before)
    best = max(found, key=lambda f: f[:2], default=None)
    return best[2] if best else None


def _writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Per tensor, the setitems that write into it: they are not among its inputs."""
    writes: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if op_name(node) == "setitem" and isinstance(node.args[0], fx.Node):
            writes.setdefault(node.args[0], []).append(node)
    return writes


def _weight(linear: fx.Node) -> fx.Node | None:
    """The parameter among a linear operation's operands, also behind a dequantisation or a cast."""
    for operand in reversed(linear.all_input_nodes[:3]):
        node, depth = operand, 0
        while (
            not is_weight(node)
            and len(node.all_input_nodes) >= 1
            and depth < 4
            and operand.op != "placeholder"
        ):
            node, depth = node.all_input_nodes[0], depth + 1
        if is_weight(node) and len(node.meta["example_value"].shape) >= 2:
            return node
    return None
