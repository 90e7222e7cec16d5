"""Where do tokens come from? One walk through a graph that follows every dimension of every tensor.

Each dimension of a tensor is an Axis: parts laid end to end (what torch.cat joined), each part a product of
atoms (what a reshape merged, slowest first). For HunyuanVideo's joint attention the walk finds that the
token axis of the query is

    ((conv F, conv H, conv W), (encoder_hidden_states dim 1,))

and this one value answers all questions about a site: if the axes of query and key differ, it is cross attention; a
part of three atoms is a frame grid; the other part is text, which comes last, and its length is known.

Graphs of Dynamo are not functional (rotary embeddings are written by setitem), so the walk goes forward, in
order, and a setitem changes what is known about its target. All arithmetic uses hints, so it installs no guards.
Rules for single operations are in rules.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..sizes import is_tensor, shape
from ..sources import POSITIONS, is_activation, last_key


@dataclass(frozen=True)
class Atom:
    """An indivisible dimension. Two atoms are equal when their keys are: the same tokens in the same order.

    node.shape[dim] is the size, also under dynamic shapes, if `exact`. root: the graph input whose data it
    is, None if it was made in the graph; root_dim: which dimension of the input, -1 if that is lost. guess:
    an operation without a rule made it, so nothing says which tokens these are.
    """

    key: Any
    node: fx.Node = field(compare=False)
    dim: int = field(compare=False)
    size: int = field(compare=False)
    root: fx.Node | None = field(compare=False)
    root_dim: int = field(compare=False, default=-1)
    exact: bool = field(compare=False, default=True)
    guess: bool = field(compare=False, default=False)

    @property
    def root_rank(self) -> int:
        """How many dimensions the input has: 5 for a clip; 0 without one."""
        return len(shape(self.root) or ())


Part = tuple[Atom, ...]
Axis = tuple[Part, ...]


def part_size(part: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in part)


def axis_size(axis: Axis) -> int:
    return sum(map(part_size, axis))


def main_atom(axis: Axis) -> Atom | None:
    """The longest atom of the longest part: it speaks for the axis."""
    return max(max(axis, key=part_size), key=lambda atom: atom.size) if axis else None


@dataclass(frozen=True)
class Gathered:
    """How an axis came about: the shards of `ranks` ranks end to end, this process's being number `rank`."""

    ranks: int
    rank: int
    shard: Axis


class Axes:
    """What the walk found. of: per tensor node, its axes. aliases: other names of the same tokens.

    When a table over positions is multiplied onto hidden states, both axes run over the same tokens. The axis of the
    hidden states is kept; the table's becomes an alias of it, because it may show the frame grid.
    flat: the dimensions that lie in a flattened tensor. gathered: what ranks put together (collectives.py).
    """

    def __init__(self) -> None:
        self.of: dict[fx.Node, tuple[Axis, ...]] = {}
        self.items: dict[fx.Node, list[tuple[Axis, ...] | None]] = {}
        self.aliases: dict[Axis, set[Axis]] = {}
        self.flat: dict[fx.Node, tuple[Axis, ...]] = {}
        self.gathered: dict[Axis, Gathered] = {}

    def fresh(
        self, node: fx.Node, dim: int, size: int, parent: Axis = (), key: Any = None, guess: bool = False
    ) -> Axis:
        """A new atom; it keeps the root of the axis that it was made from."""
        atom = main_atom(parent)
        root = atom.root if atom else None
        root_dim = atom.root_dim if atom and not guess and len(parent) == len(parent[0]) == 1 else -1
        return ((Atom((node, dim) if key is None else key, node, dim, size, root, root_dim, guess=guess),),)

    def broadcast(self, node: fx.Node, sizes: Sequence[int]) -> tuple[Axis, ...]:
        """The rule of elementwise operations, and the guess for unknown ones.

        Each dimension comes from the operand that has it too, aligned at the right; of several operands,
        from the one with the most data, and from an activation rather than a table.
        """
        operands = [self.of[n] for n in tensor_inputs(node) if n in self.of]
        operands.sort(key=lambda axes: (_data_rank(axes), math.prod(map(axis_size, axes))), reverse=True)
        found = []
        for dim, size in enumerate(sizes):
            back = dim - len(sizes)
            aligned = [axes[back] for axes in operands if len(sizes) >= len(axes) >= -back]
            same = [axis for axis in aligned if axis_size(axis) == size]
            if not same:
                parent = next((a for a in aligned if axis_size(a) > 1), ()) or _widest(operands)
                same = [self.fresh(node, dim, size, parent, guess=True)]
            if size > 1:
                for other in same[1:]:
                    self.alias(same[0], other)
            found.append(same[0])
        return tuple(found)

    def alias(self, axis: Axis, other: Axis) -> None:
        if other != axis:
            self.aliases.setdefault(axis, set()).add(other)

    def cut(self, axis: Axis, start: int, stop: int, node: fx.Node, dim: int) -> Axis:
        """Tokens start..stop of an axis: whole parts where their ends are met, else a piece."""
        found: list[Part] = []
        at = 0
        for part in axis:
            size = part_size(part)
            low, high = max(start - at, 0), min(stop - at, size)
            if (low, high) == (0, size):
                found.append(part)
            elif low < high:
                whole = low + at == start and high + at == stop
                parent = max(part, key=lambda atom: atom.size)
                key = ("cut", part, low, high)
                found.append((Atom(key, node, dim, high - low, parent.root, -1, whole),))
            at += size
        return tuple(found)

    def join(self, axes: Iterable[Axis]) -> Axis:
        """The axis of torch.cat: parts end to end; neighbouring cuts of one part grow together again."""
        parts: list[Part] = []
        for part in (part for axis in axes for part in axis):
            if part_size(part) == 0:
                continue
            last, this = (cut_of(parts[-1]) if parts else None), cut_of(part)
            if last and this and last[0] == this[0] and last[2] == this[1]:
                whole, low, high = last[0], last[1], this[2]
                atom = parts[-1][0]
                grown = Atom(("cut", whole, low, high), atom.node, atom.dim, high - low, atom.root, -1, False)
                parts[-1] = whole if (low, high) == (0, part_size(whole)) else (grown,)
            else:
                parts.append(part)
        return tuple(parts)


def cut_of(part: Part) -> tuple[Part, int, int] | None:
    """(the part, start, stop) that a piece was cut from; None if the part is not a piece."""
    key = part[0].key
    return key[1:] if len(part) == 1 and isinstance(key, tuple) and key[0] == "cut" else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Every tensor among a node's arguments, nested ones too."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _data_rank(axes: Sequence[Axis]) -> int:
    """2 for what is computed from an activation, 1 for position tables, 0 for parameters and constants."""
    roots = {atom.root for axis in axes for part in axis for atom in part if atom.root is not None}
    ranks = [(1 if POSITIONS.search(last_key(root)) else 2) if is_activation(root) else 0 for root in roots]
    return max(ranks, default=0)


def _widest(operands: Sequence[Sequence[Axis]]) -> Axis:
    axes = [axis for axes in operands[:1] for axis in axes]
    return max(axes, key=axis_size, default=())
