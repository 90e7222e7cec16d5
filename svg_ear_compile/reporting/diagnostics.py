"""What is the user told when a graph is compiled? A log entry, a trace artifact, a table or a warning."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

from .. import compat
from .ranks import own_path
from .records import GraphRecord
from .table import Report, report

log = logging.getLogger("svg_ear_compile")
"""TORCH_LOGS="+svg_ear_compile" shows it."""

SHORT = 1024
"""Shorter sequences that nothing shows to be video are not worth a warning."""

_T = TypeVar("_T")
_seen: set[object] = set()
_paths: set[str] = set()
_collected: list[GraphRecord] = []
"""Records for a report at exit, when their models may be gone."""
_collects = False


def announce(record: GraphRecord) -> None:
    """Reports one compiled graph wherever that was asked for. A failure in it is only counted, unless strict is set."""
    try:
        _announce(record)
    except Warning:
        raise  # python -W error
    except Exception as error:
        strict = record.resolved.settings.strict
        if strict:
            raise
        record.count_fallback(f"announcing: {type(error).__name__}")
        _warn_of_failure("a compiled graph was not announced", error)


def _announce(record: GraphRecord) -> None:
    found = compat.counters()["svg_ear"]
    found["graphs"] += 1
    found.update(site.reason for site in record.sites)
    if record.sites or record.other_attention or record.failure:
        text = str(report([record]))
        log.info("graph %s\n%s", record.number, text)
        compat.trace_artifact("svg_ear_report", text)
        wanted = record.resolved.settings.report or record.resolved.switch == "report"
        if isinstance(wanted, str) or _collects:
            _collected.append(record)
        if isinstance(wanted, str):
            _write(wanted, record.resolved.settings.strict)
        elif wanted and not _collects and _first(tuple(record.sites)):
            print(text, file=sys.stderr)
    trouble = complaint(record)
    if trouble is None:
        return
    if os.environ.get("SVG_EAR"):
        # The user did not name svg_ear for this model, which may be an image model: one line, once.
        if _first("complaint"):
            log.warning(trouble)
    elif _first(trouble):
        warnings.warn(trouble, UserWarning, stacklevel=2)


def not_stored() -> None:
    """Says once that torch._dynamo.config.caching_precompile does not store rewritten graphs."""
    if _first("not stored"):
        log.warning(
            "svg_ear: caching_precompile does not store graphs with sparse attention, since they would lose what "
            "decides each call: another process compiles them again, with the help of torch's other caches"
        )


def complaint(record: GraphRecord) -> str | None:
    """What to say about a graph in which nothing was rewritten; None if that is as it should be.

    Text encoders, refiners and embeddings are compiled too, and need no warning.
    """
    if record.rewritten() or record.resolved.switch != "on" or record.failure:
        return None
    if not record.sites and record.other_attention:
        others = "; ".join(record.other_attention)  # each with what to do about it
        return f"svg_ear found no scaled_dot_product_attention call to rewrite, but {others}"
    missed = [
        site
        for site in record.sites
        if site.reason == "TOO_FEW_TOKENS" or (site.reason not in ("CROSS", "TEXT") and site.q_hint >= SHORT)
    ]
    if not missed:
        return None
    reasons = Counter(s.sentence + (f" - {s.hint}" if s.hint else "") for s in missed)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"svg_ear rewrote none of {len(record.sites)} attention sites: {listed}"


def _first(key: object) -> bool:
    """Whether this is the first time since the last reset."""
    new = key not in _seen
    _seen.add(key)
    return new


def _warn_of_failure(what: str, error: Exception) -> None:
    """Warns once for each kind of error."""
    if _first((what, type(error))):
        warnings.warn(f"svg_ear: {what} because of {error!r}", RuntimeWarning, stacklevel=2)


def _write(path: str, strict: bool) -> None:
    """Writes the report on all graphs now, and again at exit, when it holds the counts of the run."""
    if not _paths:
        atexit.register(_write_all)
    _paths.add(own_path(path))
    _write_all(strict)


def collect() -> None:
    """From now on the caller shows the report, at the end (`collected`)."""
    global _collects
    _collects = True


def collected() -> Report:
    """The report over all graphs since `collect`, or since a path was named; those whose models are gone, too."""
    return report(_collected)


def _write_all(strict: bool = False) -> None:
    try:
        current = collected()
        if current.sites:  # after torch._dynamo.reset() there is nothing: then keep what was written before
            for path in _paths:
                current.write(path)
    except Exception as error:
        if strict:
            raise
        _warn_of_failure("the report was not written", error)


def timed(step: Callable[..., _T], *args: Any) -> _T:
    """Runs step(*args) and logs its time, for TORCH_LOGS="+svg_ear_compile"."""
    begin = time.perf_counter()
    out = step(*args)
    log.debug("svg_ear: %s took %.1f ms", step.__name__, 1e3 * (time.perf_counter() - begin))
    return out


def log_graph(when: str, gm: fx.GraphModule) -> None:
    """Logs the graph as Python code, for TORCH_LOGS="+svg_ear_compile"."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("svg_ear: the graph %s\n%s", when, gm.print_readable(print_output=False))


def clear() -> None:
    """Forgets what was said, so that it may be said again, and what was collected."""
    _seen.clear()
    _collected.clear()
