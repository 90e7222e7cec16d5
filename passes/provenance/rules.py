"""What does each operation do to the axes of its operands? (The question axes.py asks at every node.)

A rule returns the axes of the node's result, a list of them for an operation that returns several tensors,
or None for "treat it as elementwise". A rule whose sizes do not fit the result is ignored by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..fx_utils import argument, op_name
from ..sizes import example, hint, is_tensor, length, shape
from .axes import Atom, Axes, Axis, axis_size, main_atom
from .collectives import exchange_rule, wait_rule
from .moves import (
    Found,
    getattr_rule,
    input_axes,
    movedim_rule,
    permute_rule,
    reshape_rule,
    squeeze_rule,
    transpose_rule,
)
from .products import (
    baddbmm_rule,
    conv_rule,
    einsum_rule,
    linear_rule,
    longer_rule,
    matmul_rule,
    sdpa_rule,
)


def _number(value: Any, default: int) -> int:
    """A plain int from an int, a SymInt node, or None."""
    known = None if value is None else length(value)
    return default if known is None else known


def _cat(axes: Axes, node: fx.Node) -> Found:
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", node.kwargs.get("axis", 0))
    sources = [axes.of.get(t) for t in tensors]
    sizes = shape(node)
    if None in sources or sizes is None:
        return None
    found = list(axes.broadcast(node, sizes))
    found[dim] = axes.join(source[dim] for source in sources if source)
    return tuple(found)


def _stack(axes: Axes, node: fx.Node) -> Found:
    source = axes.of.get(argument(node, 0, "tensors")[0])
    if not source:
        return None
    dim = argument(node, 1, "dim", 0) % (len(source) + 1)
    new = axes.fresh(node, dim, len(argument(node, 0, "tensors")))
    return (*source[:dim], new, *source[dim:])


def _split(axes: Axes, node: fx.Node) -> Found:
    source, pieces = input_axes(axes, node), example(node)
    if not source or not isinstance(pieces, (tuple, list)):
        return None
    dim = argument(node, 2, "dim", 0) % len(source)
    found: list[tuple[Axis, ...] | None] = []
    at = 0
    for piece in pieces:
        size = hint(piece.shape[dim])
        if size is None:
            return [None] * len(pieces)
        getitem = next((u for u in node.users if u.args[1:] == (len(found),)), node)
        found.append((*source[:dim], axes.cut(source[dim], at, at + size, getitem, dim), *source[dim + 1 :]))
        at += size
    return found


def _unbind(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    if not source or not isinstance(example(node), (tuple, list)):
        return None
    dim = argument(node, 1, "dim", 0) % len(source)
    return [(*source[:dim], *source[dim + 1 :])] * len(example(node))


def _getitem(axes: Axes, node: fx.Node) -> Found:
    source, index = argument(node, 0, "input"), node.args[1]
    if source in axes.items:
        return axes.items[source][index] if isinstance(index, int) else None
    if source not in axes.of:
        return None
    return _index(axes, node, axes.of[source], index)


def _index(axes: Axes, node: fx.Node, source: tuple[Axis, ...], index: Any) -> Found:
    """x[index]: integers drop an axis, slices cut it, None makes one; a tensor index makes new tokens."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in [item for item in items if not isinstance(item, fx.Node)]:
        items.append(Ellipsis)
    found: list[Axis] = []
    d = 0
    for item in items:
        if item is Ellipsis:
            found += source[d : d + len(source) - used]
            d += len(source) - used
        elif item is None:
            found.append(axes.fresh(node, len(found), 1))
        elif isinstance(item, slice):
            size, step = axis_size(source[d]), _number(item.step, 1)
            start, stop, _ = slice(_number(item.start, 0), _number(item.stop, size)).indices(size)
            if step == 1:
                found.append(axes.cut(source[d], start, stop, node, len(found)))
            else:
                count = len(range(start, stop, step))
                found.append(
                    axes.fresh(node, len(found), count, source[d], ("step", source[d], start, stop, step))
                )
            d += 1
        elif isinstance(item, fx.Node) and is_tensor(item):
            item_shape = shape(item)
            plain = example(item).dtype != torch.bool and item_shape is not None and len(item_shape) == 1
            if not plain or sum(is_tensor(i) for i in items) > 1:
                return tuple(axes.fresh(node, d, n, guess=True) for d, n in enumerate(shape(node) or ()))
            assert item_shape is not None
            key = ("picked", source[d], item)
            found.append(axes.fresh(node, len(found), item_shape[0], source[d], key))
            d += 1
        else:
            d += 1
    return tuple(found)


def _reorder(axes: Axes, node: fx.Node) -> Found:
    """roll, flip, index_select: other tokens in the dimensions named, the same for the same arguments."""
    source, sizes = input_axes(axes, node), shape(node)
    if not source or sizes is None or len(sizes) != len(source):
        return None
    how = (op_name(node), node.args[1:], tuple(node.kwargs.items()))
    dims = {"roll": argument(node, 2, "dims"), "index_select": argument(node, 1, "dim")}
    touched = dims.get(op_name(node), argument(node, 1, "dims"))
    touched = [touched] if isinstance(touched, int) else touched or range(len(source))
    gone = {d % len(source) for d in touched}
    return tuple(
        axes.fresh(node, d, sizes[d], axis, ("reorder", axis, repr(how))) if d in gone else axis
        for d, axis in enumerate(source)
    )


def _setitem(axes: Axes, node: fx.Node) -> Found:
    """x[index] = value: where whole dimensions are written, a fresh x gets its axes from the value."""
    arguments: tuple[Any, ...] = node.args
    target, index, value = arguments
    old, new = axes.of.get(target), axes.of.get(value) if isinstance(value, fx.Node) else None
    items = index if isinstance(index, tuple) else (index,)
    if old and new and len(old) == len(new) and all(isinstance(i, slice) or i is Ellipsis for i in items):
        axes.of[target] = tuple(
            b if axis_size(a) == axis_size(b) and (main_atom(a) or b[0][0]).root is None else a
            for a, b in zip(old, new, strict=True)
        )
    return []


def _reduce(axes: Axes, node: fx.Node) -> Found:
    source, dims = input_axes(axes, node), argument(node, 1, "dim")
    if not source or not isinstance(dims, (int, tuple, list)):
        return None
    gone = {d % len(source) for d in ([dims] if isinstance(dims, int) else dims)}
    if argument(node, 2, "keepdim", False):
        return tuple(axes.fresh(node, d, 1) if d in gone else axis for d, axis in enumerate(source))
    return tuple(axis for d, axis in enumerate(source) if d not in gone)


def _scatter(axes: Axes, node: fx.Node) -> Found:
    """index_copy and the like: only the index knows which tokens these are now."""
    source, sizes = input_axes(axes, node), shape(node)
    dim = argument(node, 1, "dim")
    if not source or sizes is None or not isinstance(dim, int):
        return None
    dim %= len(source)
    return (*source[:dim], axes.fresh(node, dim, sizes[dim], guess=True), *source[dim + 1 :])


def _as_complex(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    return source[:-1] if source else None


RULES: dict[str, Callable[[Axes, fx.Node], Found]] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), transpose_rule),
    **dict.fromkeys(("movedim", "moveaxis"), movedim_rule),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "contiguous"), reshape_rule),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeeze_rule),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv_rule),
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul_rule),
    **dict.fromkeys(("roll", "flip", "index_select"), _reorder),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax", "any", "all"), _reduce),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "softmax", "dropout", "type_as", "to"), input_axes),
    **dict.fromkeys(("index_copy", "index_add", "index_fill", "scatter", "scatter_add"), _scatter),
    "permute": permute_rule, "all_to_all_single": exchange_rule, "wait_tensor": wait_rule,
    "view_as_complex": _as_complex, "view_as_real": longer_rule,
    "baddbmm": baddbmm_rule, "einsum": einsum_rule,
    "stack": _stack, "unbind": _unbind, "getitem": _getitem, "setitem": _setitem, "linear": linear_rule,
    "embedding": longer_rule, "scaled_dot_product_attention": sdpa_rule, "getattr": getattr_rule,
}  # fmt: skip


def trace_axes(graph: fx.Graph) -> Axes:
    """Walks a graph from its inputs and follows every dimension of every tensor."""
    axes = Axes()
    for node in graph.nodes:
        sizes = shape(node)
        if node.op in ("placeholder", "get_attr") and sizes is not None:
            axes.of[node] = tuple(((Atom((node, d), node, d, n, node, d),),) for d, n in enumerate(sizes))
        if node.op not in ("call_function", "call_method"):
            continue
        rule = RULES.get(op_name(node))
        found = rule(axes, node) if rule else None
        if isinstance(found, list):
            axes.items[node] = found
        elif sizes is not None:
            fits = found is not None and tuple(map(axis_size, found)) == sizes
            axes.of[node] = found if found is not None and fits else axes.broadcast(node, sizes)
    return axes
