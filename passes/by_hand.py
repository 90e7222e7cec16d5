"""Is this matrix product the end of an attention that a model writes out? softmax(q k^T * scale + bias) v.

    scores = matmul(q, k^T) | einsum(q, k) | baddbmm(bias, q, k^T, alpha=scale)
    scores = scores * scale, / number, cast: in any order, as often as wanted
             scores + bias | masked_fill(hidden, -large) | where(seen, scores, -large): once
    out    = matmul(dropout(softmax(scores, -1)), v) | einsum(softmax, v)

k^T must be a transpose of a key that is a node of its own. Each node in between must serve this attention
only: who also returns the scores needs them computed anyway.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axis_moves import argument, op_name
from .sizes import constant, example, is_tensor

HIDES = -1e4
"""Scores of at most this hide a key: exp(-10000) is 0 in every dtype."""

_MATMUL = {"matmul", "bmm", "__matmul__"}
_NOT = {"invert", "bitwise_not", "logical_not", "__invert__"}
_CASTS = {"to", "float", "half", "bfloat16", "type_as", "type", "contiguous"}


@dataclass(frozen=True)
class Written:
    """The arguments of the scaled_dot_product_attention call that would do the same.

    mask_hides: attn_mask is bool, and True where a key may not be seen.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: Any
    scale: float
    mask_hides: bool = False


def by_hand(last: fx.Node) -> Written | None:
    """What the product `last` computes, if it is attention."""
    weights, value = _product(last, transposed=False)
    dropout: Any = 0.0
    node = weights
    while node is not None and op_name(node) in _CASTS | {"dropout"} and _serves_only_this(node):
        if op_name(node) == "dropout" and argument(node, 2, "training", True):
            dropout = argument(node, 1, "p", 0.5)
        node = _first(node)
    if node is None or value is None or op_name(node) != "softmax" or not _serves_only_this(node):
        return None
    if argument(node, 1, "dim") not in (-1, example(node).dim() - 1):
        return None
    return _scores(_first(node), value, dropout)


def is_attention_like(last: fx.Node) -> bool:
    """Whether a softmax of a matrix product enters the matrix product `last`: attention in some form."""
    node = _product(last, transposed=False)[0]
    while node is not None and op_name(node) in _CASTS | {"dropout"}:
        node = _first(node)
    if node is None or op_name(node) != "softmax":
        return False
    for _ in range(6):
        if node is not None and op_name(node) == "where":
            node = next((n for n in node.args[1:] if is_tensor(n)), None)  # type: ignore[assignment]
        else:
            node = _first(node) if node is not None else None
        if node is not None and op_name(node) in _MATMUL | {"einsum", "baddbmm"}:
            return True
    return False


def _scores(node: fx.Node | None, value: fx.Node, dropout: Any) -> Written | None:
    """Reads scores backwards, from the softmax to the product of query and key."""
    scale, bias, hides = 1.0, None, False
    while node is not None and _serves_only_this(node):
        name = op_name(node)
        if name in _MATMUL | {"einsum", "baddbmm"}:
            query, key = _product(node, transposed=True)
            if name == "baddbmm":
                beta = node.kwargs.get("beta", 1)
                if beta != 0 and (bias is not None or beta != 1 or scale != 1.0):
                    return None
                bias = node.args[0] if beta else bias
                scale *= node.kwargs.get("alpha", 1.0)  # type: ignore[operator]
            if query is None or key is None or (bias is not None and not isinstance(bias, fx.Node)):
                return None
            return Written(query, key, value, bias, dropout, scale, hides)
        before = _first(node)
        if name in ("mul", "truediv", "div", "mul_", "div_"):
            number = constant(node.args[1]) if len(node.args) > 1 else None
            if number is None:
                return None
            scale = scale * number if name.startswith("mul") else scale / number
        elif name == "add" and bias is None and scale == 1.0 and not node.kwargs and is_tensor(node.args[1]):
            bias = node.args[1]  # and not scaled afterwards, like the bias of scaled_dot_product_attention
        elif name in ("masked_fill", "masked_fill_", "where") and bias is None:
            before, bias, hides, fill = _masked(node)
            if before is None or fill is None or not fill * scale <= HIDES:
                return None
        elif name not in _CASTS:
            return None
        node = before
    return None


def _masked(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None, bool, float | None]:
    """(scores before, bool mask, whether it is True where a key is hidden, what is written there)."""
    if len(node.args) != 3:
        return None, None, False, None
    first, second, third = node.args
    if op_name(node) != "where":
        scores, mask, hides, fill = first, second, True, third
    elif is_tensor(second) and example(second).dim() > 0:
        mask, scores, fill, hides = first, second, third, False
    else:
        mask, fill, scores, hides = first, second, third, True
    if isinstance(fill, fx.Node) and fill.target is torch.tensor:
        fill = fill.args[0]
    while is_tensor(mask) and op_name(mask) in _NOT:  # type: ignore[arg-type]
        mask, hides = mask.args[0], not hides  # type: ignore[union-attr]
    if not is_tensor(scores) or not is_tensor(mask) or example(mask).dtype != torch.bool:
        return None, None, False, None
    return scores, mask, hides, constant(fill)  # type: ignore[return-value]


def _product(node: fx.Node, transposed: bool) -> tuple[fx.Node | None, fx.Node | None]:
    """(first, second) of a product over the last dimension of first and that of second: second is transposed
    where it stands, or the plain product over its last dimension but one if not `transposed`."""
    name = op_name(node)
    if name == "einsum":
        operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        kind = _einsum_kind(node.args[0])
        if kind != ("scores" if transposed else "output") or len(operands) != 2:
            return None, None
        first, second = operands
        return (first, second) if is_tensor(first) and is_tensor(second) else (None, None)  # type: ignore
    if name == "baddbmm" and transposed:
        first, second = node.args[1:3]
    elif name in _MATMUL and node.target is not operator.imatmul and len(node.args) == 2:
        first, second = node.args
    else:
        return None, None
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None, None
    if example(first).dim() != example(second).dim():
        return None, None
    return first, _transposed(second) if transposed else second


def _einsum_kind(equation: Any) -> str:
    """'scores' for bhqd,bhkd->bhqk, 'output' for bhqk,bhkd->bhqd, whatever the letters; else ''."""
    if not isinstance(equation, str) or "." in equation or equation.count(",") != 1 or "->" not in equation:
        return ""
    inputs, out = equation.replace(" ", "").split("->")
    first, second = inputs.split(",")
    if not 3 <= len(first) == len(second) == len(out) or first[:-2] != second[:-2] or first[:-2] != out[:-2]:
        return ""
    q, a, b, c = *first[-2:], *second[-2:]
    if a == c and out[-2:] == q + b:
        return "scores"
    return "output" if a == b and out[-2:] == q + c else ""


def _transposed(node: fx.Node) -> fx.Node | None:
    """The node of which this one swaps the last two dimensions."""
    source, rank = _first(node), example(node).dim()
    name, dims = op_name(node), node.args[1:]
    if name in ("transpose", "swapaxes", "swapdims"):
        swapped = {d % rank for d in dims if isinstance(d, int)} == {rank - 1, rank - 2}
    elif name == "permute":
        order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        swapped = tuple(order) == (*range(rank - 2), rank - 1, rank - 2)
    else:
        swapped = name == "getattr" and dims == ("mT",)
    return source if swapped else None


def _first(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _serves_only_this(node: fx.Node) -> bool:
    return len(node.users) == 1
