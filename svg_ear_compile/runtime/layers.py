"""What is kept for one attention layer while a generation runs?"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .head_variants import HeadVariants

MAX_FAILURES = 3
"""A layer that failed this many times in a row stays dense."""

Carried = tuple[Tensor, Tensor]
"""What clustering carries over, for queries and for keys: centroids of k-means, or orders of splits."""


@dataclass(eq=False)
class Layer:
    """One layer in one generation.

    number: its place in the order in which the layers of its model first appear. carried: per guidance branch, with the
    shape, device and stream that it belongs to. sparse_calls: per branch. variants: which variant each head uses.
    boost: this layer's density over the generation's. guarded: the error because of which it runs dense. strikes,
    failures: the number of errors beyond the guard, and of failed calls, in a row.
    """

    number: int
    carried: dict[int, tuple[Hashable, Carried]] = field(default_factory=dict)
    sparse_calls: dict[int, int] = field(default_factory=dict)
    variants: HeadVariants = field(default_factory=HeadVariants)
    boost: float = 1.0
    guarded: float | None = None
    strikes: int = 0
    failures: int = 0

    def recall(self, branch: int, stamp: Hashable) -> Carried | None:
        """What was kept for this branch, if it has the same stamp."""
        kept = self.carried.get(branch)
        return kept[1] if kept is not None and kept[0] == stamp else None

    def keep(self, branch: int, stamp: Hashable, carried: Carried) -> None:
        self.carried[branch] = (stamp, carried)
