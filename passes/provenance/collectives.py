"""What do collectives do to axes? Ulysses attention exchanges a shard of the tokens for a share of the heads.

Before attention every rank holds [B, S/P, H, D]: all heads of its tokens. It arranges them by the rank that will
receive them, exchanges them, and joins the shards of all ranks. After attention the same happens in reverse:

    [P, S/P, B, H/P, D]  all_to_all_single ->  [P, S/P, B, H/P, D]  flatten(0, 1) ->  [S, B, H/P, D]
    [P, H/P, B, S/P, D]  all_to_all_single ->  [P, H/P, B, S/P, D]  flatten(0, 1) ->  [H, B, S/P, D]

In the result the first dimension counts ranks. Merged with the next one, it gives the whole of which each rank held a
shard. `Axes.gathered` remembers the shard of each whole, so that cutting it into [P, S/P] gives the shard again.

Collectives take one flat tensor; `Axes.flat` remembers which dimensions lie in it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from svg_ear_compile.compat import process_group

from ..fx_utils import argument
from ..sizes import length
from .axes import Atom, Axes, Axis, Gathered, Part, axis_size, cut_of, part_size


def exchange_rule(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    """all_to_all_single in equal shares: the first dimension counts the ranks that data came from."""
    if len(node.args) != 4:
        return None
    arguments: tuple[Any, ...] = node.args
    source, received, sent, group = arguments
    dims = axes.flat.get(source) or axes.of.get(source)
    shares = [length(n) for n in (*received, *sent)]
    if not dims or len(set(shares)) != 1 or 2 * axis_size(dims[0]) != len(shares):
        return None
    ranks = axis_size(dims[0])
    exchanged = (((Atom(("ranks", group, ranks), node, 0, ranks, None, exact=False),),), *dims[1:])
    if source not in axes.flat:
        return exchanged
    axes.flat[node] = exchanged
    return None


def wait_rule(axes: Axes, node: fx.Node) -> tuple[Axis, ...] | None:
    source = argument(node, 0, "input")
    if source in axes.flat:
        axes.flat[node] = axes.flat[source]
    return axes.of.get(source)


def merged_ranks(axes: Axes, first: Axis, second: Axis) -> Axis | None:
    """What flattening [ranks, shard] gives: the whole. None if the first axis does not count ranks."""
    key = first[0][0].key if len(first) == len(first[0]) == 1 else None
    if not isinstance(key, tuple) or key[0] != "ranks":
        return None
    _, group, ranks = key
    rank = rank_in(group)
    wholes = [_whole(part, ranks, rank) for part in second]
    shards = [
        _piece(part, whole, i) for i in range(ranks) for part, whole in zip(second, wholes, strict=True)
    ]
    joined = axes.join((shard,) for shard in shards)
    axes.gathered[joined] = Gathered(ranks, rank, second)
    for other in axes.aliases.get(second, ()):
        if len(other) == 1 and cut_of(other[0]):
            axes.alias(joined, (_whole(other[0], ranks, rank),))
    return joined


def shard_of(axes: Axes, whole: Axis, sizes: tuple[int, ...]) -> tuple[Axis, Axis] | None:
    """(ranks, shard) if a gathered axis is cut into [ranks, shard] again; else None."""
    found = axes.gathered.get(whole)
    if found is None or sizes != (found.ranks, axis_size(found.shard)):
        return None
    atom = whole[0][0]
    return ((Atom(("targets", whole), atom.node, atom.dim, found.ranks, None, exact=False),),), found.shard


def _whole(part: Part, ranks: int, rank: int) -> Part:
    """The part of which every rank holds such a shard: what it was cut from, if that was cut rank by rank."""
    cut = cut_of(part)
    if cut is not None:
        whole, low, high = cut
        if (high - low) * ranks == part_size(whole) and low == rank * (high - low):
            return whole
    main = max(part, key=lambda atom: atom.size)
    size = part_size(part) * ranks
    return (Atom(("gathered", part, ranks), main.node, main.dim, size, main.root, -1, False, main.guess),)


def _piece(part: Part, whole: Part, rank: int) -> Part:
    """The shard that another rank holds of the whole, where this one holds `part`."""
    size, main = part_size(part), max(part, key=lambda atom: atom.size)
    exact = len(part) == 1 and main.exact
    key = ("cut", whole, rank * size, (rank + 1) * size)
    return (Atom(key, main.node, main.dim, size, main.root, -1, exact, main.guess),)


def rank_in(group: Any) -> int:
    """This process's number in a process group, by the group's name in graphs."""
    import torch.distributed as dist

    return dist.get_rank(process_group(group))
