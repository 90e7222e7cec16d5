"""How long is a dimension? Shapes of graph nodes as plain numbers, without installing a guard.

Under dynamic shapes a size is a SymInt: comparing it would make Dynamo specialise the graph on today's
resolution. So passes compute with hints, the values seen at compile time, and put expressions of the graph
(`Extent`) where a run-time value is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from svg_ear_compile.compat import example_value, expression, size_hint


def example(node: Any) -> Any:
    """The fake value that Dynamo left on a node; None for anything else."""
    return example_value(node) if isinstance(node, fx.Node) else None


def is_tensor(node: Any) -> bool:
    return isinstance(example(node), torch.Tensor)


def hint(size: Any) -> int | None:
    """The value of a size at compile time; None if it is known only at run time (an unbacked symbol)."""
    return size_hint(size) if isinstance(size, torch.SymInt) else int(size)


def length(size: Any) -> int | None:
    """The same of a number, a symbol, or a node that holds one."""
    return hint(example(size) if isinstance(size, fx.Node) else size)


def is_symbolic(size: Any) -> bool:
    """Whether a compiled graph takes other values of this size, too."""
    return isinstance(size, torch.SymInt) and not expression(size).is_number


def constant(value: Any) -> float | None:
    """A number of the graph that no run changes: a literal, or a symbol that was specialised; else None.

    Under dynamic=True a module's `self.scale` is a symbol; code that needs the float makes Dynamo specialise it.
    """
    value = example(value) if isinstance(value, fx.Node) else value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        expr = expression(value)
        return float(expr) if expr.is_number else None
    return value if isinstance(value, (int, float)) else None


def is_inverse_root(value: Any, size: Any) -> bool:
    """Whether a symbolic number is 1 / sqrt(size) whatever the size, in one of the ways to write that."""
    if not isinstance(value, torch.SymFloat) or not isinstance(size, torch.SymInt):
        return False
    forms = (1 / torch.sym_sqrt(size), size**-0.5, 1 / size**0.5, torch.sym_sqrt(size) ** -1)
    return any(expression(value) == expression(form) for form in forms)


def shape(node: Any) -> tuple[int, ...] | None:
    """The shape of a tensor node in hints; None for other nodes and for sizes that are known only at run time."""
    value = example(node)
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size for size in map(hint, value.shape) if size is not None]
    return tuple(sizes) if len(sizes) == value.dim() else None


def shown(size: Any) -> int | str:
    """A size as people see it: a number, or its symbolic expression."""
    return str(expression(size)) if isinstance(size, torch.SymInt) else int(size)


@dataclass(frozen=True)
class Extent:
    """A length in tokens that is known only at run time: `constant` plus products of dimensions of nodes.

    terms: each term is a product of sizes, each (node, dimension). rewrite.py turns it into graph nodes.
    """

    terms: tuple[tuple[tuple[fx.Node, int], ...], ...]
    constant: int = 0

    @property
    def hint(self) -> int:
        return self.constant + sum(
            math.prod(hint(example(n).shape[d]) or 0 for n, d in term) for term in self.terms
        )

    def __str__(self) -> str:
        parts = ["*".join(f"{node.name}.size({dim})" for node, dim in term) for term in self.terms]
        return " + ".join(parts + [str(self.constant)] * bool(self.constant))


def length_hint(length: int | Extent) -> int:
    """An int, or an Extent's value at compile time."""
    return length if isinstance(length, int) else length.hint
