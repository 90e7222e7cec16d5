"""Where in the sequence do the video tokens lie, and where the others?

Mostly video is one stretch, and text comes before or after it: then `num_text` and `text_first` say all, and no list is
needed. Two kinds of sequences need one:

- Under context parallelism a joint sequence is that of all ranks end to end, each with its share of the video and of
  the text: [video 0, text 0, video 1, text 1, ...].
- A packed sequence holds text, sound, and several videos and images in any order.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..constants import SiteConstants

Grid = tuple[int, int, int]
"""(frames, height, width), in tokens."""


class Places(NamedTuple):
    """video [n], other [L - n]: positions in the sequence, int64, of the video in the order of its grid. name: equal
    for equal lists; None where nothing says that they are."""

    video: Tensor
    other: Tensor
    name: Hashable


class Packed(NamedTuple):
    """The places of a packed sequence, on the host, and the frame grids that its video forms.

    grids: (frames, height, width) of videos whose tokens follow each other in `video`; (): the video forms none.
    """

    places: Places
    grids: tuple[Grid, ...]

    @property
    def length(self) -> int:
        """The number of rows."""
        return len(self.places.video) + len(self.places.other)

    @property
    def frames(self) -> int:
        """The frames of all grids."""
        return sum(grid[0] for grid in self.grids)

    def on(self, device: torch.device) -> Places:
        """The places on a device."""
        video, other, name = self.places
        return Places(video.to(device), other.to(device), name)


def of_shards(length: int, c: SiteConstants, device: torch.device) -> Places:
    """The places where the sequence is that of `c.shards` ranks end to end."""
    if length % c.shards or c.num_text % c.shards:
        raise ValueError(f"{length} tokens, {c.num_text} of them text, in {c.shards} equal shares")
    shares = torch.arange(length, device=device).view(c.shards, -1)
    text = c.num_text // c.shards
    first, last = shares.split(
        (text, shares.shape[1] - text) if c.text_first else (shares.shape[1] - text, text), 1
    )
    video, other = (last, first) if c.text_first else (first, last)
    return Places(video.flatten(), other.flatten(), (length, c.num_text, c.text_first, c.shards))
