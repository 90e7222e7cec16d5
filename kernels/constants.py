"""What is fixed for a site when its graph is compiled?"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class SiteConstants(NamedTuple):
    """The trailing arguments of a site's ops.

    scale: of the logits, 1/sqrt(head_dim) when None. num_text: text tokens of the sequence, first or last
    in it. grid: (frames, height, width) of the video tokens, or empty. order: how video tokens are put into
    blocks, "auto" (splits where no grid is known, else cubes but for the
    heads that the context names), "cubes", "splits", "kmeans". routing: which
    blocks are exact, "output_error" (one budget for a batch element), "svg_ear" or "mass" (the papers).
    compensate: whether centroids stand for skipped blocks. density: exact video query-key pairs over all of
    them, where the call's context says nothing else; None: as the routing finds. site: the number of the site
    in its graph. min_tokens, min_frames: of the video; a call with fewer is dense. 0 where all calls have one
    size, so that nothing is left to check. shards: the sequence is that of so many ranks end to end, each with its
    equal share of the video and of the text (kernels/blocks/places.py). host: somebody decides each call just before it
    (context.py), so a call of which nobody does is dense; False: the op is called directly.
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

    def scale_of(self, query: Tensor) -> float:
        """What the logits of these queries [...,D] are multiplied by."""
        return 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale

    def too_small(self, query: Tensor, grid: tuple[int, int, int] | None) -> str:
        """Why a call with these queries [B,H,L,D] is too small to be sparse, for the report; "" if it is not.

        grid: the frame grid, where the constants do not have it.
        """
        if query.shape[2] - self.num_text < self.min_tokens:
            return "too few tokens"
        frames = next(iter(self.grid or grid or ()), self.min_frames)
        return "one frame" if frames < self.min_frames else ""
