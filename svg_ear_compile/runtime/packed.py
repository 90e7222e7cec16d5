"""Which rows of a packed sequence are video, and which frame grids do they form? Arguments of the model's call say so.

A packed sequence holds text, sound, videos and images in any order. Which rows are video is data: no shape shows it,
and graphs of single blocks do not get it. The model does, so it is read off the call stack (caller.py): once a
generation, and again if the tensors are others or were changed in place. Inference tensors do not count their changes,
so they are read in each call of the model.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..kernels.blocks.places import Grid, Packed, Places
from .caller import Caller, argument
from .generations import Generation, ModelCalls

MOST_GRIDS = 64
"""A request has a clip, its keyframes and some references: a dozen or two."""


def packed_rows(
    who: Caller, names: tuple[str, str], generation: Generation, calls: ModelCalls, frozen: bool
) -> Packed | None:
    """The rows of the call that begins; None if the model is not called with such arguments.

    names: of the arguments that hold the video's rows [n] and the positions of all rows [S,3]. frozen: a CUDA graph is
    being recorded, so nothing can be read.
    """
    tensors = [argument(who, name) for name in names]
    if not all(isinstance(x, Tensor) for x in tensors):
        return None
    unversioned = any(x.is_inference() for x in tensors)
    known: dict[Hashable, Any] = calls.read if unversioned else generation.memos
    key, state = ("packed", calls.number), [0 if unversioned else compat.version(x) for x in tensors]
    before = known.get(key)
    if before is not None and before[1] == state and all(map(operator.is_, before[0], tensors)):
        return before[2]
    if frozen:
        return None
    found = read(*(x.detach().to("cpu", copy=True) for x in tensors))
    known[key] = tensors, state, found
    return found


def read(video: Tensor, positions: Tensor) -> Packed | None:
    """The rows video [n] int and positions [S,3] as places and grids; None if they are no such thing. On the CPU."""
    if video.dim() != 1 or positions.dim() != 2 or positions.shape[1] != 3 or not len(video):
        return None
    length, video = len(positions), video.long()
    if video.min() < 0 or video.max() >= length:
        return None
    is_video = torch.zeros(length, dtype=torch.bool, device="cpu")
    is_video[video] = True
    if int(is_video.sum()) != len(video):  # a row twice
        return None
    grids = find_grids(positions[video].double())
    content = hashlib.sha256(video.numpy().tobytes()).hexdigest()
    return Packed(Places(video, (~is_video).nonzero()[:, 0], (content, length)), grids)


def find_grids(positions: Tensor) -> tuple[Grid, ...]:
    """The frame grids of rows at positions [n,3] (time, height, width), one video after another; () if they form none.

    A frame is a stretch of one time, row by row from left to right. Frames of the same rows and columns whose times
    increase are one video. Rows that would fall into more than MOST_GRIDS lie in another order.
    """
    time, places = positions[:, 0], positions[:, 1:]
    step = places[1:] - places[:-1]
    goes_on = (step[:, 0] > 0) | ((step[:, 0] == 0) & (step[:, 1] > 0))
    starts = ((time[1:] != time[:-1]) | ~goes_on).nonzero()[:, 0] + 1
    grids: list[Grid] = []
    last: Tensor | None = None
    before = -torch.inf
    for frame, now in zip(places.tensor_split(starts), time[[0, *starts.tolist()]].tolist(), strict=True):
        width = int((frame[:, 0] == frame[0, 0]).sum())
        if len(frame) % width:
            return ()
        rows = frame.view(-1, width, 2)
        if not (rows[..., 0] == rows[:, :1, 0]).all() or not (rows[..., 1] == rows[:1, :, 1]).all():
            return ()
        if last is not None and now > before and torch.equal(frame, last):
            grids[-1] = (grids[-1][0] + 1, *grids[-1][1:])
        else:
            grids.append((1, len(rows), width))
            if len(grids) > MOST_GRIDS:
                return ()
        last, before = frame, now
    return tuple(grids)


def in_words(packed: Packed) -> str:
    """For the report."""
    grids = " and ".join("{} x {} x {}".format(*grid) for grid in packed.grids) or "no grid"
    return f"{len(packed.places.video)} of {packed.length} rows are video: {grids}"
