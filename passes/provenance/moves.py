"""What do operations do to axes that only move, merge or split dimensions? Transposes and reshapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..fx_utils import argument, op_name
from ..sizes import shape
from .axes import Atom, Axes, Axis, axis_size
from .collectives import merged_ranks, shard_of

Found = tuple[Axis, ...] | list[tuple[Axis, ...] | None] | None


def input_axes(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    source = argument(node, 0, "input")
    return axes.of.get(source) if isinstance(source, fx.Node) else None


def permute_rule(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    dims: Any = (
        node.args[1:] if len(node.args) > 2 else (argument(node, 1, "dims") or range(len(source or ())))
    )
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return tuple(source[d] for d in dims) if source else None


def transpose_rule(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    if not source:
        return None
    first, second = (
        (-2, -1) if op_name(node) == "t" else (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    )
    found = list(source)
    found[first], found[second] = found[second], found[first]
    return tuple(found)


def movedim_rule(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    a, b = argument(node, 1, "source"), argument(node, 2, "destination")
    if not source or not isinstance(a, int) or not isinstance(b, int):
        return None
    found = list(source)
    found.insert(b % len(source), found.pop(a % len(source)))
    return tuple(found)


def getattr_rule(axes: Axes, node: fx.Node) -> Found:
    source = input_axes(axes, node)
    return (*source[:-2], source[-1], source[-2]) if source and node.args[1] in ("mT", "T") else None


def reshape_rule(axes: Axes, node: fx.Node) -> Found:
    source, sizes = input_axes(axes, node), shape(node)
    if not source or sizes is None:
        return None
    source = axes.flat.get(argument(node, 0, "input"), source)
    if len(sizes) == 1 < len(source):
        axes.flat[node] = source
    if op_name(node) == "flatten":
        first, last = (
            argument(node, i, n, d) % len(source) for i, n, d in ((1, "start_dim", 0), (2, "end_dim", -1))
        )
        merged = _regroup(axes, node, source[first : last + 1], sizes[first : first + 1], first)
        return (*source[:first], *merged, *source[last + 1 :])
    found: list[Axis] = []
    rest = list(source)
    while len(found) < len(sizes):
        taken, count = rest[:1], 1
        rest = rest[1:]
        have, want = math.prod(map(axis_size, taken)), sizes[len(found)]
        while have != want:
            if have < want and rest:
                have *= axis_size(rest[0])
                taken.append(rest.pop(0))
            elif have > want and len(found) + count < len(sizes):
                want *= sizes[len(found) + count]
                count += 1
            else:
                return None
        found += _regroup(axes, node, taken, sizes[len(found) : len(found) + count], len(found))
    return tuple(found)


def _regroup(axes: Axes, node: fx.Node, source: Sequence[Axis], sizes: Sequence[int], dim: int) -> list[Axis]:
    """Axes whose sizes have one product, as dimensions of other sizes: merged, split, or both."""
    if len(sizes) == 1 and len(source) == 1:
        return list(source)
    if len(source) == 2 and len(sizes) == 1 and (whole := merged_ranks(axes, *source)):
        return [whole]
    if len(source) == 1 and (shard := shard_of(axes, source[0], tuple(sizes))):
        return [*shard]
    joined = [axis for axis in source if len(axis) > 1]
    if joined:  # what torch.cat made can only be merged with dimensions of size 1
        keep = [axis_size(joined[0]) == size for size in sizes]
        return [
            joined[0] if k else axes.fresh(node, dim + i, sizes[i], joined[0]) for i, k in enumerate(keep)
        ]
    atoms = [atom for axis in source for part in axis for atom in part]
    found: list[Axis] = []
    for i, size in enumerate(sizes):
        last = i == len(sizes) - 1
        taken: list[Atom] = []
        while atoms and (last or not taken or math.prod(a.size for a in taken) < size):
            if not last and not taken and size == 1 and atoms[0].size > 1:
                break
            taken.append(atoms.pop(0))
        if taken and math.prod(a.size for a in taken) == size:
            found.append((tuple(taken),))
        elif not taken:
            found.append(axes.fresh(node, dim + i, size))
        else:  # an atom is split; the same split of the same atoms gives equal pieces elsewhere
            remaining, pieces = tuple(taken + atoms), tuple(sizes[i:])
            for j, piece in enumerate(pieces):
                key = ("split", remaining, pieces, j)
                found.append(axes.fresh(node, dim + i + j, piece, (remaining,), key))
            break
    return found


def squeeze_rule(axes: Axes, node: fx.Node) -> Found:
    source, dim = input_axes(axes, node), argument(node, 1, "dim")
    if not source or not isinstance(dim, int):
        return reshape_rule(axes, node)
    if op_name(node) == "squeeze":
        return tuple(axis for d, axis in enumerate(source) if d != dim % len(source) or axis_size(axis) > 1)
    found = list(source)
    dim %= len(source) + 1
    found.insert(dim, axes.fresh(node, dim, 1))
    return tuple(found)
