"""Which attention lies in a graph inside the graph?

Dynamo gives some regions a graph module of their own, which one node of the graph calls: activation checkpointing,
torch.compiler.nested_compile_region, branches and loops. A region that just runs, and whose outputs need no gradient,
is written out in its place, and its attention becomes a site like any other. Attention in other regions is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from svg_ear_compile.compat import is_higher_order

from .fx_utils import SDPA, copy_graph, op_name
from .sizes import example

_REGIONS = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}
"""Operations that run a graph, their first argument, and how many arguments are not the graph's."""
_WORDS = {
    "tag_activation_checkpoint": "activation checkpointing",
    "invoke_subgraph": "torch.compiler.nested_compile_region",
}


def inline_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """gm itself, or a copy in whose graph all regions with attention are written out that can be."""
    while any(_can_inline(gm, node) for node in gm.graph.nodes):
        graph, copies = copy_graph(gm.graph)
        for node in gm.graph.nodes:
            if _can_inline(gm, node):
                _inline(graph, copies[node], str(node.args[0].target), _bodies(gm, node)[0])
        graph.lint()
        gm = fx.GraphModule(gm, graph)
    return gm


def nested_attention(gm: fx.GraphModule) -> list[tuple[str, str, fx.Node]]:
    """(operation, what to do, the call inside) of each attention call in the graphs that nodes of gm's graph run."""
    found = []
    for node in gm.graph.nodes:
        for body in _bodies(gm, node):
            name = op_name(node)
            calls = body.graph.find_nodes(op="call_function", target=SDPA)
            kind = f"attention inside of {_WORDS.get(name, name)}"
            found += [(kind, _advice(name), call) for call in calls]
            found += nested_attention(body)
    return found


def _advice(name: str) -> str:
    if name in _REGIONS:
        return "gradients are required: call the model under torch.no_grad() or torch.inference_mode()"
    return "only attention outside of control flow operations is rewritten"


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graph modules among a higher-order operation's arguments."""
    if not is_higher_order(node.target):
        return []
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    modules = [dict(gm.named_modules()).get(name) for name in dict.fromkeys(names)]
    return [module for module in modules if isinstance(module, fx.GraphModule)]


def _can_inline(gm: fx.GraphModule, node: fx.Node) -> bool:
    bodies = _bodies(gm, node)
    if len(bodies) != 1 or op_name(node) not in _REGIONS:
        return False
    outputs = [example(user) for user in node.users] + [example(node)]
    flat = [x for out in outputs for x in (out if isinstance(out, (tuple, list)) else [out])]
    wanted = any(x.requires_grad for x in flat if isinstance(x, torch.Tensor))
    has_attention = bodies[0].graph.find_nodes(op="call_function", target=SDPA) or nested_attention(bodies[0])
    return bool(has_attention) and not wanted


def _inline(graph: fx.Graph, node: fx.Node, path: str, body: fx.GraphModule) -> None:
    """Writes the nodes of a body where a node runs it."""
    operands = iter(node.args[_REGIONS[op_name(node)] :])
    copies: dict[fx.Node, Any] = {}
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(operands)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], copies.__getitem__)
            else:
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                if inner.op == "get_attr":
                    copies[inner].target = f"{path}.{inner.target}"
    for user in list(node.users):  # item i of the outputs
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
