"""How many keys does a mask show? Read once per call of the model, since reading it waits for the device.

Graphs of single blocks get the same mask in each block. It is read in the first block and holds for the call of the
model, as long as the tensors that the mask is computed from are the same objects, and unchanged (each change in place
increases a tensor's version).

Inference tensors have no version, so their masks are read in each call of a graph. While a CUDA graph is being recorded
nothing is read or remembered, since a replay would not look again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import version
from ..kernels.capture import is_recorded


class MaskSource(NamedTuple):
    """What a mask is made from: the arguments of its graph at these positions.

    function: a key for how it is computed, the same for all masks that are computed alike, in any graph. sized: whether
    it also depends on sizes, which are arguments of the graph too.
    """

    positions: tuple[int, ...]
    function: Hashable
    sized: bool = True


Known = dict[Hashable, Any]
"""By state of a mask's sources: these tensors, kept so that no other takes their address, and what the mask shows."""


def recall(
    known: Known, seen: dict[int, int | None], number: int, args: tuple[Any, ...], source: MaskSource
) -> None:
    """Sets seen[number] for mask `number` of a graph, if its sources were seen in this call of the model."""
    found = known.get(_key(args, source))
    if found is not None:
        seen[number] = found[1]


def keep(
    known: Known, seen: dict[int, int | None], number: int, args: tuple[Any, ...], source: MaskSource
) -> None:
    """Remembers seen[number], if this call of the graph found it."""
    key = _key(args, source)
    if key is not None and number in seen:
        known[key] = ([args[i] for i in source.positions], seen[number])


def _key(args: tuple[Any, ...], source: MaskSource) -> Any:
    """A key for the state of a mask's sources; None if there is none."""
    tensors = [args[i] for i in source.positions]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in tensors):
        return None
    if any(is_recorded(x) for x in tensors):
        return None
    sizes = tuple(x for x in args if isinstance(x, int)) if source.sized else ()
    return source.function, sizes, tuple((id(x), version(x)) for x in tensors)
