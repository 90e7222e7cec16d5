"""What is known about each compiled graph? Decisions made at compile time, and counts made at run time.

A record holds only plain values (no graph, no weight) and lives as long as the compiled callable.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..kernels.context import SiteTotals
from ..passes.site import Site, SiteFacts
from ..precedence import Resolved
from ..runtime.density import CallLog

MAX_GENERATIONS = 8
"""Calls are logged for this many generations, since several may run at once in several threads."""
MAX_LOGS = 100_000
"""This many calls of a graph are logged: 60 layers, 4 branches and 400 steps."""


@dataclass(frozen=True)
class SiteRecord(SiteFacts):
    """A Site without its graph nodes. Symbolic numbers are given as seen at compile time."""

    site: int
    rewritten: bool
    reason: str
    sentence: str
    hint: str
    num_text: int
    grid: tuple[int, ...] | None
    grid_source: str

    @classmethod
    def of(cls, site: Site) -> SiteRecord:
        facts = {f.name: getattr(site, f.name) for f in fields(SiteFacts)}
        verdict, layout = site.verdict, site.layout
        return cls(
            **facts, site=site.index, rewritten=verdict.rewrite, reason=verdict.reason.name, sentence=str(verdict),
            hint=verdict.hint, num_text=layout.text_hint, grid=layout.grid_hint, grid_source=layout.grid_source,
        )  # fmt: skip

    @property
    def flops_dense(self) -> int:
        return 4 * self.batch * self.heads * self.head_dim * self.q_hint * self.k_hint

    def flops_planned(self, density: float | None) -> int:
        """FLOPs of the exact pairs: a share of the video pairs, and all pairs with text. None: unknown, so dense."""
        if not self.rewritten or density is None:
            return self.flops_dense
        video = (self.q_hint - self.num_text) ** 2
        skipped = round((1 - density) * video)
        return 4 * self.batch * self.heads * self.head_dim * (self.q_hint * self.k_hint - skipped)


@dataclass(eq=False)
class GraphRecord:
    """One compiled graph. Threads may count in it while others read it.

    other_attention: nodes that look like attention but do not call SDPA. graph_breaks: why Dynamo broke graphs before
    this one, if it holds no attention. failure: the error because of which the graph was handed on untouched.
    passes_seconds, compiling_seconds: how long our passes, and what compiles the graph after them, took.
    kernels: which attention kernels run, and why no faster ones do. steps: what the step clock says now.
    grid: (frames, height, width) in tokens, if only the arguments of a call show it. packed: which rows of a packed
    sequence are video, in words. fallbacks: at run time, by reason.
    totals: per device and thread, the sums that the ops keep. logs: what was done in each call of the last few
    generations. owner: the compiled callable, with which the record goes; None: not compiled yet.
    """

    number: int
    resolved: Resolved
    sites: list[SiteRecord] = field(default_factory=list)
    other_attention: list[str] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    failure: str | None = None
    passes_seconds: float = 0.0
    compiling_seconds: float = 0.0
    kernels: list[str] = field(default_factory=list)
    steps: str = ""
    grid: tuple[int, int, int] | None = None
    packed: str = ""
    sparse: Counter[int] = field(default_factory=Counter)
    dense: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    fallbacks: Counter[str] = field(default_factory=Counter)
    totals: dict[Any, dict[int, SiteTotals]] = field(default_factory=dict)
    logs: OrderedDict[int, deque[CallLog]] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    owner: weakref.ref[Any] | None = None

    def rewritten(self) -> list[SiteRecord]:
        return [site for site in self.sites if site.rewritten]

    def totals_on(self, device: Any) -> dict[int, SiteTotals]:
        """The sums of this thread on this device, so that no addition involves a second device."""
        with self.lock:
            return self.totals.setdefault((device, threading.get_ident()), {})

    def count(
        self, dense: Mapping[int, str], generation: int | None = None, logs: Sequence[CallLog] = ()
    ) -> None:
        """Counts one call of the graph: its dense sites by reason; all other sites in `logs` ran sparse."""
        with self.lock:
            for site, reason in dense.items():
                self.dense[site][reason] += 1
            self.sparse.update(log.site for log in logs if log.site not in dense)
            if generation is not None:
                if generation not in self.logs:
                    self.logs[generation] = deque(maxlen=MAX_LOGS)
                    while len(self.logs) > MAX_GENERATIONS:
                        self.logs.popitem(last=False)
                self.logs[generation].extend(logs)

    def count_fallback(self, reason: str) -> None:
        with self.lock:
            self.fallbacks[reason] += 1

    def last_generation(self) -> list[CallLog]:
        """What was done in each call of the latest generation."""
        with self.lock:
            return list(self.logs[max(self.logs)]) if self.logs else []

    def measured(self, site: int) -> tuple[float, float, int]:
        """(exact, executed, all) query-key pairs of the site's sparse calls. Reads from the device."""
        exact = executed = 0.0
        pairs = 0
        with self.lock:
            totals = [dict(sums) for sums in self.totals.values()]
        for sums in totals:
            areas = sums[site].areas if site in sums else None
            if areas is not None:
                more = areas.tolist()
                exact, executed = exact + more[0], executed + more[1]
                pairs += sums[site].pairs
        return exact, executed, pairs


_lock = threading.Lock()
_records: list[GraphRecord] = []
_count = 0


def new_record(resolved: Resolved) -> GraphRecord:
    """A new record."""
    global _count
    with _lock:
        record = GraphRecord(_count, resolved)
        _records.append(record)
        _count += 1
    return record


def live_records() -> list[GraphRecord]:
    """The records of the graphs that are still compiled, in order of compilation."""
    with _lock:
        _records[:] = [record for record in _records if record.owner is None or record.owner() is not None]
        return [*_records]


def has_attention_alone() -> bool:
    """Whether some graph holds nothing but an attention module, as inside a cache's hooks.

    The rest of its block is then a graph without attention, in which nothing is missing.
    """
    return any(site.module_path == "" for record in live_records() for site in record.sites)


def drop(record: GraphRecord) -> None:
    """Forgets the record of a compilation that failed."""
    with _lock:
        _records[:] = [other for other in _records if other is not record]


def clear() -> None:
    global _count
    with _lock:
        _records.clear()
        _count = 0
