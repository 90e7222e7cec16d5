"""What do products do to axes? Linear layers, convolutions and attention keep the tokens."""

from __future__ import annotations

from torch import fx

from ..fx_utils import argument
from ..sizes import shape
from .axes import Axes
from .moves import Found, input_axes


def linear_rule(axes: Axes, node: fx.Node) -> Found:
    source, sizes = input_axes(axes, node), shape(node)
    if not source or sizes is None:
        return None
    return (*source[:-1], axes.fresh(node, len(sizes) - 1, sizes[-1], source[-1]))


def matmul_rule(axes: Axes, node: fx.Node) -> Found:
    first, second = axes.of.get(argument(node, 0, "input")), axes.of.get(argument(node, 1, "other"))
    if not first or not second or len(first) != len(second):
        return linear_rule(axes, node)
    return (*first[:-1], second[-1])


def baddbmm_rule(axes: Axes, node: fx.Node) -> Found:
    first, second = axes.of.get(argument(node, 1, "batch1")), axes.of.get(argument(node, 2, "batch2"))
    return (*first[:-1], second[-1]) if first and second else None


def einsum_rule(axes: Axes, node: fx.Node) -> Found:
    equation, *operands = node.args
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    nodes = operands[0] if isinstance(operands[0], (tuple, list)) else operands
    known = {
        letter: axis
        for letters, n in reversed(list(zip(inputs.split(","), nodes, strict=True)))
        for letter, axis in zip(letters, axes.of.get(n, ()), strict=False)
    }
    return tuple(known[letter] for letter in out) if set(out) <= set(known) else None


def conv_rule(axes: Axes, node: fx.Node) -> Found:
    source, sizes = input_axes(axes, node), shape(node)
    if not source or sizes is None or len(source) != len(sizes):
        return None
    return (source[0], *(axes.fresh(node, d, sizes[d], source[d]) for d in range(1, len(sizes))))


def longer_rule(axes: Axes, node: fx.Node) -> Found:
    """embedding, view_as_real: a dimension more at the end."""
    source, sizes = input_axes(axes, node), shape(node)
    return (*source, axes.fresh(node, len(source), sizes[-1])) if source and sizes else None


def sdpa_rule(axes: Axes, node: fx.Node) -> Found:
    query, value = axes.of.get(argument(node, 0, "query")), axes.of.get(argument(node, 2, "value"))
    return (*query[:-1], value[-1]) if query and value else None
