"""What do graphs of Dynamo have in common with any other? Copies of them, and the modules around a node."""

from __future__ import annotations

import re
from copy import copy

import torch
from torch import fx

from .axis_moves import is_in_place

SDPA = torch.nn.functional.scaled_dot_product_attention


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """(readable path, qualified class name) of the modules around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        (readable_path(path), cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}")
        for path, cls in stack.values()
    ]


def readable_path(path: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn1` -> `blocks.0.attn1`; without a hook's reference."""
    path = re.sub(r"^(L|G)\['\w+'\](.*\.__self__)?", "", path)
    path = re.sub(r"(\.__dict__)?(\['_modules'\]|\._modules)", "", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).strip(".")


def without_numbers(path: str) -> str:
    """`blocks.7.attn1` -> `blocks.*.attn1`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy (meta and Dynamo sources of placeholders included), and its node for each of the old ones."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    new._codegen = copy(graph._codegen)
    return new, copies


def remove_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erases a node without users, and upstream of it all that only it used. What writes in place stays."""
    if node.users or node.op not in ("call_function", "call_method") or is_in_place(node):
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for source in before:
        if not source._erased:
            remove_unused(graph, source)
