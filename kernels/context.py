"""What does the host tell the ops about the call that is running, and what do they tell the host?

The constants of a site are in the graph. What changes from call to call (is this layer dense at this step?
which frame grid?) is decided on the host just before the compiled graph runs. A RunContext holds these
`Decisions`, the `Results` of the ops, and a `Memo` of what later calls use again, per thread, until the graph
returns. Without a context, an op that is called directly runs sparse and keeps nothing. An op of a rewritten
graph runs dense, because its host is gone (`SiteConstants.host`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .blocks.places import Packed
from .constants import SiteConstants

_T = TypeVar("_T")
# How many things are remembered at a time: the orders and offsets of a few resolutions, and for each layer which heads
# go by splits or get first-order terms. The largest is an order: 12 MB at 720p.
_REMEMBERED = 128


@dataclass
class SiteTotals:
    """Sums over the sparse calls of one site. They stay on the device until the report reads them.

    areas: [2] int64, query-key pairs of video tokens computed exactly, and the same with the padding of
    tiles; pairs: all query-key pairs of video tokens.
    """

    areas: Tensor | None = None
    pairs: int = 0

    def add(self, areas: Tensor, pairs: int) -> None:
        """Adds one call."""
        self.areas = areas if self.areas is None else self.areas + areas
        self.pairs += pairs


class Measure(NamedTuple):
    """What to measure in one call of one site, on rows drawn from `seed` (kernels/measuring/errors.py).

    A sparse call measures its own error. With densities it is also a trial: it measures the errors that the
    call would have made in each of `orders` (none: the order of the site) at each of `densities`. With
    first_order it tries each of them with first-order terms too (kernels/attention/first_order.py).
    """

    seed: int
    densities: tuple[float, ...] = ()
    orders: tuple[str, ...] = ()
    first_order: bool = False


@dataclass(frozen=True, slots=True)
class SiteDecision:
    """What the host decided about one site of a call.

    dense: why the site runs dense in this call; "": it runs sparse. density: what a sparse call may spend;
    None: whatever the routing finds. split_heads: [H], which heads go by splits although the grid is known
    (order "auto"); empty: none. first_order: [H], which heads get first-order terms
    (kernels/attention/first_order.py); empty: none; None: all. measure: what to measure, or None.
    """

    dense: str = ""
    density: float | None = None
    split_heads: tuple[bool, ...] = ()
    first_order: tuple[bool, ...] | None = ()
    measure: Measure | None = None


@dataclass(frozen=True)
class Decisions:
    """What the host decided before the call. Nothing changes it afterwards.

    sites: by number. A site that is missing runs sparse, with the density of its constants.
    grid: (frames, height, width) in tokens, where only the arguments of this call show it.
    packed: the rows of a packed sequence that are video, where sites are packed and the host knows them.
    mask_ids: sites with the same number share one mask tensor in this call, so it is read once.
    names: module paths, by site. strict: raise instead of running dense after an error.
    audit: whether sparse calls also measure their error over all rows.
    """

    sites: Mapping[int, SiteDecision] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    packed: Packed | None = None
    mask_ids: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    strict: bool = False
    audit: bool = False

    def of(self, c: SiteConstants) -> SiteDecision:
        """The decision about a site."""
        return self.sites.get(c.site) or SiteDecision(density=c.density)

    def constants(self, constants: Sequence[Any]) -> SiteConstants:
        """The constants of a site in this call, which knows how many rows of a packed sequence are not video."""
        c = SiteConstants(*constants)
        if not c.packed or self.packed is None:
            return c
        return c._replace(num_text=len(self.packed.places.other))

    def name_of(self, site: int) -> str:
        """How messages name the site."""
        return f"attention site {site}" + (f" ({self.names[site]})" if self.names.get(site) else "")


@dataclass
class Results:
    """What the ops found. Keys are the numbers of sites.

    dense: why a site ran dense that should have run sparse: it failed, or its call is too small.
    measured: [errors,2,B,H] float32 on the device: the error of a sparse call, then those of what was tried.
    audited: the same over all rows. fallbacks: how many, by reason. totals: computed areas.
    Several calls may share fallbacks and totals.
    """

    dense: dict[int, str] = field(default_factory=dict)
    measured: dict[int, Tensor] = field(default_factory=dict)
    audited: dict[int, Tensor] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    totals: dict[int, SiteTotals] = field(default_factory=dict)


@dataclass
class Memo:
    """What is kept for later calls.

    carried: by site, what clustering left for this layer and guidance branch: k-means its centroids of
        queries and keys, to go on from; splits their orders, to be used again.
    seen_keys: by mask number, how many keys a mask shows if it shows the first ones, and as many in each
        batch element; else None.
    made: what depends on shapes alone (`remember`). warned: kinds of errors that were warned of.
    Several calls may share made and warned.
    """

    carried: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen_keys: dict[int, int | None] = field(default_factory=dict)
    made: dict[Hashable, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def remember(self, device: torch.device, key: Hashable, make: Callable[[], _T]) -> _T:
        """make(), or what it returned when it was last called for this key.

        Tensors stay with the stream that made them. What is made while a CUDA graph is recorded belongs to the
        graph, and is not kept.
        """
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            key = (key, torch.cuda.current_stream(device))
        key = (key, device)
        found: _T | None = self.made.get(key)
        if found is None:
            for oldest in [*self.made][: len(self.made) + 1 - _REMEMBERED]:
                self.made.pop(oldest, None)  # another thread may have taken it out
            found = self.made[key] = make()
        return found


@dataclass(frozen=True)
class RunContext:
    """One call of one compiled graph: what was decided, what was found, and what is kept."""

    decisions: Decisions = field(default_factory=Decisions)
    results: Results = field(default_factory=Results)
    memo: Memo = field(default_factory=Memo)


_thread = threading.local()


def current() -> RunContext:
    """The context of the running call; a fresh, empty one outside of any."""
    return getattr(_thread, "call", None) or RunContext()


def inside() -> bool:
    """Whether this thread runs inside a call."""
    return getattr(_thread, "call", None) is not None


@contextmanager
def active(call: RunContext) -> Iterator[None]:
    """Makes `call` the context of this thread inside the with block."""
    before = getattr(_thread, "call", None)
    _thread.call = call
    try:
        yield
    finally:
        _thread.call = before
