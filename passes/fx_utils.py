"""What does everybody need who reads a graph? Names and arguments of nodes, the modules around them, copies."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from svg_ear_compile import compat

from .sizes import example, hint

SDPA = torch.nn.functional.scaled_dot_product_attention
_AUGMENTED = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    operator.imatmul,
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """'reshape' for a method, a torch function and an aten op alike."""
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def is_in_place(node: fx.Node) -> bool:
    """Whether an operation writes into its first argument: x[i] = y, x.add_(y), x += y."""
    name = op_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or node.target in _AUGMENTED
    return name.endswith("_") and not name.endswith("__")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name. Under dynamic shapes even a dimension's number may be a node."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    known = hint(size) if isinstance(size := example(value), (int, torch.SymInt)) else None
    return value if known is None else known


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
        compat.copy_source(node, copies[node])
    compat.copy_codegen(graph, new)
    return new, copies


def remove_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erases a node without users, and upstream of it all that only it used. What writes in place stays."""
    if node.users or node.op not in ("call_function", "call_method") or is_in_place(node):
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for source in before:
        if not compat.is_erased(source):
            remove_unused(graph, source)
