"""What does the host tell the ops about the call that is running?

The constants of a site are in the graph. What changes from call to call (is this layer dense at this
step, which frame grid, which carried centroids) is decided on the host just before the compiled graph
runs, and lies here, per thread, until it returns. Without a context an op that is called directly runs sparse and
carries nothing; one of a rewritten graph runs dense, since its host is gone (`SiteConstants.host`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
# So many things are remembered at a time: the orders and offsets of a few resolutions, and which heads of each layer
# go by splits or get first-order terms. An order is the largest: 12 MB at 720p.
_REMEMBERED = 128


@dataclass
class SiteTotals:
    """Sums over the sparse calls of one site, kept on the device: reading them is the report's business.

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

    A sparse call measures its own error. With densities a call tries, too: it measures the errors that it
    would have made in each of `orders` (none: the site's own) at each of `densities`, without and, with
    first_order, also with first-order terms (kernels/attention/first_order.py).
    """

    seed: int
    densities: tuple[float, ...] = ()
    orders: tuple[str, ...] = ()
    first_order: bool = False


@dataclass
class RunContext:
    """One call of one compiled graph.

    dense: the reason for each site that runs dense in this call; absent means sparse.
    density: per site, what its sparse call may spend, instead of the site's constant.
    split_heads: per site of the order "auto", which heads are put into blocks by splits although the grid is
    known, [H]; absent: none.
    first_order: per site, which heads get first-order terms (kernels/attention/first_order.py), [H]; absent: none.
    measure: per site, what is to be measured; measured: the answer, [errors, 2, B, H] float32 on the device:
    of a sparse call its own error, then those of what was tried.
    audit: whether sparse calls leave their error over all rows, too; audited: it, per site, as in measured.
    grid: (frames, height, width) in tokens, when only the arguments of this call show it.
    carried: per site, what clustering left last time for this layer, branch and model: k-means the centroids
    of queries and keys to go on from, splits their orders, to be used again.
    fixed: what does not depend on a call's tensors but on their shapes (`remember`).
    mask_ids: sites with one number here share one mask tensor in this call, so it is read once.
    seen_keys: per such number, how many keys its mask shows, if it shows the first of each batch element and
    equally many; else None. All of them: the mask is dropped.
    counters: fallbacks by reason. totals: areas per site; None: they are not summed up, since a CUDA graph is
    recorded, whose replays would. warned: kinds of errors already warned about.
    names: module paths of sites. strict: raise instead of running dense after an error.
    carried, fixed, counters, totals, warned and names may be shared by many calls; the rest is this
    call's own.
    """

    dense: dict[int, str] = field(default_factory=dict)
    density: dict[int, float | None] = field(default_factory=dict)
    split_heads: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    first_order: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    measure: dict[int, Measure] = field(default_factory=dict)
    measured: dict[int, Tensor] = field(default_factory=dict)
    audit: bool = False
    audited: dict[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    carried: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fixed: dict[Hashable, Any] = field(default_factory=dict)
    mask_ids: dict[int, int] = field(default_factory=dict)
    seen_keys: dict[int, int | None] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    totals: dict[int, SiteTotals] | None = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)
    strict: bool = False

    def name_of(self, site: int) -> str:
        """The site for people."""
        return f"attention site {site}" + (f" ({self.names[site]})" if self.names.get(site) else "")

    def remember(self, device: torch.device, key: Hashable, make: Callable[[], _T]) -> _T:
        """make(), or what it gave when it was last called under this key.

        Tensors stay with the stream that made them; what is made while a CUDA graph records belongs to it.
        """
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            key = (key, torch.cuda.current_stream(device))
        key = (key, device)
        found: _T | None = self.fixed.get(key)
        if found is None:
            for oldest in [*self.fixed][: len(self.fixed) + 1 - _REMEMBERED]:
                self.fixed.pop(oldest, None)  # another thread may have taken it out
            found = self.fixed[key] = make()
        return found


_thread = threading.local()


def current() -> RunContext:
    """The context of the running call; a fresh, empty one outside of any."""
    return getattr(_thread, "call", None) or RunContext()


def inside() -> bool:
    """Whether this thread runs inside a call, so that its ops can tell each other something."""
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
