"""What is fixed for a site when its graph is compiled?"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

OWN_CALL = -1
"""The site number of a call that belongs to no rewritten graph: it shares nothing with the calls around it."""


class SiteConstants(NamedTuple):
    """The trailing arguments of a site's ops.

    scale: factor of the logits; None: 1/sqrt(head_dim).
    num_text, text_first: how many text tokens the sequence has, and whether they come first or last.
    grid: (frames, height, width) of the video tokens, or empty.
    order: how video tokens are put into blocks: "cubes", "splits", "kmeans", or "auto": splits where no grid
        is known, else cubes but for the heads that the context names.
    routing: which blocks are computed exactly: "output_error" (one budget for a batch element), "svg_ear" or
        "mass" (the papers).
    compensate: whether centroids stand for skipped blocks.
    density: share of the video query-key pairs that is computed exactly, unless the context names another
        one; None: whatever the routing finds.
    seed: of the k-means. site: the number of the site in its graph.
    min_tokens, min_frames: a call with fewer of the video is dense; 0: nothing to check.
    shards: the sequence is that of this many ranks end to end, each with an equal share of the video and of
        the text (kernels/blocks/places.py).
    packed: which rows are video differs from call to call (context.Decisions.packed); num_text and grid are not known.
    host: the host decides each call just before it (context.py), so a call without a decision is dense;
        False: the op is called directly.
    """

    scale: float | None
    num_text: int
    text_first: bool
    grid: list[int]
    order: str
    routing: str
    compensate: bool
    density: float | None
    seed: int
    site: int
    min_tokens: int = 0
    min_frames: int = 0
    shards: int = 1
    host: bool = False
    packed: bool = False

    @property
    def variable(self) -> bool:
        """Whether blocks may be of any size: clusters, not equal tiles."""
        return self.order == "kmeans"

    def scale_of(self, query: Tensor) -> float:
        """The factor of the logits of these queries [...,D]."""
        return 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale

    def too_small(self, query: Tensor, frames: int | None) -> str:
        """Why a call with these queries [B,H,L,D] is too small to be sparse, as the report says it; "" if it is not.

        frames: how many the video has, where the constants do not know it and the call does.
        """
        if query.shape[2] - self.num_text < self.min_tokens:
            return "too few tokens"
        frames = self.grid[0] if self.grid else frames
        return "one frame" if frames is not None and frames < self.min_frames else ""
