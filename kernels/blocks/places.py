"""Where in the sequence do the video tokens lie, and where the others?

Mostly video is one stretch, and text comes before or after it: then `num_text` and `text_first` say all, and no list is
needed. Under context parallelism a joint sequence is that of all ranks end to end, each with its share of the video and
of the text: [video 0, text 0, video 1, text 1, ...].
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ..constants import SiteConstants


class Places(NamedTuple):
    """video [n], other [L - n]: positions in the sequence, int64, of the video in the order of its grid. name: equal
    for equal lists; None where nothing says that they are."""

    video: Tensor
    other: Tensor
    name: Hashable


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
