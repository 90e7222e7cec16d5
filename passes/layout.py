"""Where do the text tokens of a site lie, and which frame grid do its video tokens form?

Both are read off the token axis of the query (provenance/). Parts that come from encoder_hidden_states or the like are
text. A video part of three atoms is a grid (frames, height, width), because a reshape merged exactly these three
dimensions, whatever the patch embedding was. Graphs of single blocks get flattened tokens: there the grid is not in the
graph, and the host reads it off the rotary tables (rotary.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .provenance.axes import Atom, Axes, Axis, Part, cut_of, part_size
from .rotary import grid_from_rotary
from .site import GraphInputs, Layout
from .sizes import Extent, example
from .sources import TEXT, is_activation, last_key


def video_parts(axis: Axis) -> list[Part]:
    """The parts of a token axis that are certainly video; if there are none, the longest part that is not text."""
    certain = [part for part in axis if is_clip(part)]
    if certain:
        return certain
    others = [part for part in axis if not _is_text(part)]
    rooted = [part for part in others if any(is_activation(atom.root) for atom in part)]
    return [max(rooted or others, key=part_size)] if others else []


def is_clip(part: Part) -> bool:
    """Whether a part stems from a 5-D input and spans more than one frame's worth of its dimensions."""
    from_video = any(atom.root_rank == 5 for atom in part)
    return from_video and len(part) != 2 and (len(part) > 2 or part[0].root_dim < 0)


def is_factorised(axis: Axis) -> bool:
    """Whether tokens of a video are attended frame by frame, or along one dimension only."""
    return any(atom.root_rank == 5 and not is_clip(part) for part in axis for atom in part)


def read_layout(axes: Axes, axis: Axis) -> Layout | None:
    """The layout of a site's tokens; None if text lies on both sides of the video tokens or among them."""
    gathered = axes.gathered.get(axis)
    if gathered is None:
        return _layout(axes, axis)
    ranks, share = gathered.ranks, len(gathered.shard)
    found = _layout(axes, axis) if len(axis) == 1 else _layout(axes, axis[:share], ranks)
    if found is None or len(axis) not in (1, ranks * share):
        return None
    return replace(found, shards=ranks, shard=gathered.rank)


def _layout(axes: Axes, axis: Axis, ranks: int = 1) -> Layout | None:
    """axis: all tokens, or the share of the first of several ranks, whose parts are pieces of wholes."""
    video = video_parts(axis)
    if not video:
        return Layout()
    places = [i for i, part in enumerate(axis) if part in video]
    first, last = places[0], places[-1]
    before, after = axis[:first], axis[last + 1 :]
    if (before and after) or last - first + 1 != len(places):
        return None
    text = before or after
    num_text = _length(text * ranks)
    if num_text is None:
        return None
    cut = cut_of(video[0]) if ranks > 1 else None
    of_all = video[0] if cut is None else cut[0]
    grid, source = _grid(axes, of_all) if len(places) == 1 else (None, "several videos laid end to end")
    words = ", ".join(f"{_root_name(part)} {'first' if before else 'last'}" for part in text)
    return Layout(num_text, bool(before), grid, words or "video only", source)


def grid_reader(inputs: GraphInputs) -> Callable[[Sequence[Tensor], int], tuple[int, int, int] | None]:
    """A function (rotary tables of a call, their rows) -> the frame grid of all tokens, or None."""
    return lambda tables, rows: grid_from_rotary(tables, rows * inputs.shards, inputs.shards, inputs.shard)


def _is_text(part: Part) -> bool:
    return bool(TEXT.search(_root_name(part)))


def _root_name(part: Part) -> str:
    roots = [atom.root for atom in sorted(part, key=lambda atom: -atom.size) if atom.root is not None]
    return last_key(roots[0]) if roots else "constant"


def _length(parts: Sequence[Part]) -> int | Extent | None:
    """The summed length of parts: a number, or an Extent; None if the graph holds no expression for it."""
    constant, terms = 0, []
    for part in parts:
        if all(isinstance(_size(atom), int) for atom in part):
            constant += part_size(part)
        elif all(atom.exact and _size(atom) is not None for atom in part):
            terms.append(tuple((atom.node, atom.dim) for atom in part))
        else:
            return None
    return Extent(tuple(terms), constant) if terms else constant


def _size(atom: Atom) -> object:
    """The size of an atom as its node's fake shows it: int or SymInt; None if the node is no tensor."""
    value = example(atom.node)
    if isinstance(value, torch.Tensor):
        return value.shape[atom.dim] if atom.exact else _static(value, atom)
    if isinstance(value, (tuple, list)):
        return _static(value[0], atom)
    return None


def _static(value: torch.Tensor, atom: Atom) -> int | None:
    return atom.size if isinstance(value.shape[atom.dim], int) else None


def _grid(axes: Axes, part: Part) -> tuple[tuple[int | Extent, int | Extent, int | Extent] | None, str]:
    """(frames, height, width) of a video part, and where it was read."""
    for atoms, source in [(part, "shapes")] + [
        (alias[0], "position table")
        for alias in sorted(axes.aliases.get((part,), ()), key=str)
        if len(alias) == 1
    ]:
        kept = list(atoms)
        while len(kept) > 3 and any(atom.size == 1 for atom in kept):
            kept.remove(next(atom for atom in kept if atom.size == 1))
        dims = [atom.root_dim for atom in kept if atom.root_dim >= 0]
        if len(kept) not in (2, 3) or dims != sorted(dims):
            continue
        lengths = [_length([(atom,)]) for atom in kept]
        if len(lengths) == 2 and source == "shapes" and kept[0].root_rank > 3:
            lengths.insert(0, 1)  # an image; two dimensions of flattened tokens may be anything
        known = [length for length in lengths if length is not None]
        if len(lengths) == len(known) == 3:
            root = kept[-1].root
            where = f"{source} of {last_key(root)}" if root is not None and source == "shapes" else source
            return (known[0], known[1], known[2]), where
    return None, "unknown"
