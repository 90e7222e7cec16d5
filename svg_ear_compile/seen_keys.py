"""How many keys do masks show, as far as that was read before? So that it is read once.

Reading a mask waits for the device. What was read holds for as long as the tensors that the mask is a
function of are the same objects, at the same address, of the same shape and version (every change in place
counts up a tensor's version), and for one generation at most. HunyuanVideo's whole graph makes its mask from
the pipeline's `encoder_attention_mask`: one read per generation and branch. Its blocks, compiled one by one,
get a new mask in each model call, made outside of all graphs: one read per model call, which both kinds of
blocks share, since their mask is the argument itself.

Inference tensors have no version: their masks are read in each call of a graph. So are masks while a CUDA
graph is recorded: a replay would not look again.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_MASKS = 64
"""So many masks of a thread are remembered: for each in each graph, those of the branches of guidance."""


class MaskSource(NamedTuple):
    """What a mask is made from: the arguments of its graph at these positions.

    function: how, and the same for all masks that are made alike, in whichever graph. sized: whether sizes
    have a say in it, which are arguments of the graph too.
    """

    positions: tuple[int, ...]
    function: Hashable
    sized: bool = True


class SeenKeys:
    """What one thread knows of masks. Tensors are held weakly."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._known: OrderedDict[Any, tuple[list[weakref.ref[Tensor]], int | None]] = OrderedDict()

    def begin(self, generation: int) -> None:
        """A call of this generation comes: what was read in another one is forgotten."""
        if generation != self._generation:
            self._generation = generation
            self._known.clear()

    def recall(
        self, seen: dict[int, int | None], number: int, args: tuple[Any, ...], source: MaskSource
    ) -> None:
        """Sets seen[number] for mask `number` of a graph, if what it is made from was met before."""
        key = _key(args, source)
        if key in self._known:
            refs, count = self._known[key]
            if all(ref() is args[i] for ref, i in zip(refs, source.positions, strict=True)):
                seen[number] = count

    def keep(
        self, seen: dict[int, int | None], number: int, args: tuple[Any, ...], source: MaskSource
    ) -> None:
        """Remembers seen[number], if this call found it."""
        key = _key(args, source)
        if key is None or number not in seen:
            return
        self._known[key] = ([weakref.ref(args[i]) for i in source.positions], seen[number])
        self._known.move_to_end(key)
        while len(self._known) > MAX_MASKS:
            self._known.popitem(last=False)


def _key(args: tuple[Any, ...], source: MaskSource) -> Any:
    """Tells one state of a mask's sources from another; None where nothing can."""
    tensors = [args[i] for i in source.positions]
    if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference() for x in tensors):
        return None
    if any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing():
        return None
    sizes = tuple(x for x in args if isinstance(x, int)) if source.sized else ()
    states = tuple((id(x), x._version, x.data_ptr(), x.shape, x.stride()) for x in tensors)
    return source.function, sizes, states


_thread = threading.local()


def seen_keys() -> SeenKeys:
    """What this thread knows."""
    if not hasattr(_thread, "known"):
        _thread.known = SeenKeys()
    known: SeenKeys = _thread.known
    return known
