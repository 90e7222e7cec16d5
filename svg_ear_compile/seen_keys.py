"""How many keys do the masks of a graph show, as far as that was read before? So that it is read once.

Reading a mask waits for the device. What was read holds for as long as the tensors that the mask is a
function of are the same objects, at the same address and of the same version (every change in place counts
up a tensor's version), and for one generation at most. HunyuanVideo's whole graph makes its mask from the
pipeline's `encoder_attention_mask`: one read per generation and branch. Its blocks, compiled one by one, get
a new mask in each model call: one read per model call.

Inference tensors have no version: their masks are read in each call of a graph. So are masks while a CUDA
graph is recorded: a replay would not look again.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

MAX_MASKS = 16
"""So many masks of a graph are remembered: those of the branches of guidance, for each mask in the graph."""


class SeenKeys:
    """What one thread knows of the masks of one graph. Tensors are held weakly."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._known: OrderedDict[Any, tuple[list[weakref.ref[Tensor]], int | None]] = OrderedDict()

    def begin(self, generation: int) -> None:
        """A call of this generation comes: what was read in another one is forgotten."""
        if generation != self._generation:
            self._generation = generation
            self._known.clear()

    def recall(
        self, seen: dict[int, int | None], number: int, args: tuple[Any, ...], positions: tuple[int, ...]
    ) -> None:
        """Sets seen[number] for mask `number`, if its sources args[positions] were met before."""
        key = _key(number, args, positions)
        if key in self._known:
            refs, count = self._known[key]
            if all(ref() is args[i] for ref, i in zip(refs, positions, strict=True)):
                seen[number] = count

    def keep(
        self, seen: dict[int, int | None], number: int, args: tuple[Any, ...], positions: tuple[int, ...]
    ) -> None:
        """Remembers seen[number], if this call found it."""
        key = _key(number, args, positions)
        if key is None or number not in seen:
            return
        self._known[key] = ([weakref.ref(args[i]) for i in positions], seen[number])
        self._known.move_to_end(key)
        while len(self._known) > MAX_MASKS:
            self._known.popitem(last=False)


def _key(number: int, args: tuple[Any, ...], positions: tuple[int, ...]) -> Any:
    """Tells one state of a mask's sources from another; None where nothing can."""
    sources = [args[i] for i in positions]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in sources):
        return None
    if any(x.is_cuda for x in sources) and torch.cuda.is_current_stream_capturing():
        return None
    sizes = tuple(x for x in args if isinstance(x, int))
    return number, sizes, tuple((id(x), x._version, x.data_ptr()) for x in sources)
