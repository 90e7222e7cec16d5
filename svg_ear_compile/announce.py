"""What does the user hear when a graph is compiled? A log entry, a trace artifact, a table or a warning."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections import Counter

from torch._logging import trace_structured

from .records import GraphRecord
from .reports import report

log = logging.getLogger("svg_ear_compile")
"""TORCH_LOGS="+svg_ear_compile" shows it."""

SHORT = 1024
"""Sequences without a sign of video that are shorter than this are nobody's video: no reason to speak."""

_seen: set[object] = set()
_paths: set[str] = set()


def announce(record: GraphRecord) -> None:
    """Tells about one compiled graph, everywhere it was asked for."""
    if record.sites or record.other_attention or record.failure:
        text = str(report([record]))
        log.info("graph %s\n%s", record.number, text)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "svg_ear_report", "encoding": "string"},
            payload_fn=lambda: text,
        )
        wanted = record.resolved.settings.report or record.resolved.switch == "report"
        if isinstance(wanted, str):
            _write(wanted)
        elif wanted and _first(tuple(record.sites)):
            print(text, file=sys.stderr)
    trouble = complaint(record)
    if trouble is None:
        return
    if os.environ.get("SVG_EAR"):
        # Nobody asked for svg_ear in this very place; it may be an image model. One line, once.
        if _first("complaint"):
            log.warning(trouble)
    elif _first(trouble):
        warnings.warn(trouble, UserWarning, stacklevel=2)


def not_stored() -> None:
    """torch._dynamo.config.caching_precompile is on: a rewritten graph is left out of what it stores."""
    if _first("not stored"):
        log.warning(
            "svg_ear: caching_precompile does not store graphs with sparse attention, since they would lose what "
            "decides each call: another process compiles them anew, with the other caches of torch"
        )


def complaint(record: GraphRecord) -> str | None:
    """What to tell about a graph in which nothing was rewritten, if it matters; else None.

    Text encoders, refiners and embeddings are compiled too: they are no reason to speak.
    """
    if record.rewritten() or record.resolved.switch != "on" or record.failure:
        return None
    if not record.sites and record.other_attention:
        return (
            "svg_ear found no scaled_dot_product_attention call to rewrite, but "
            f"{', '.join(record.other_attention)}. If the model was set to another attention backend: in "
            'diffusers, call model.set_attention_backend("native"); reset_attention_backend() leaves the '
            "other one in place for all models"
        )
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


def _write(path: str) -> None:
    """Writes the report on all graphs now, and once more at exit, when it holds the run's counts."""
    if not _paths:
        atexit.register(_write_all)
    _paths.add(path)
    _write_all()


def _write_all() -> None:
    current = report()
    if not current.sites:
        return  # at exit the model may be gone: what was written while it lived is better
    try:
        for path in _paths:
            current.write(path)
    except OSError as error:
        warnings.warn(f"svg_ear: the report was not written: {error}", RuntimeWarning, stacklevel=2)


def clear() -> None:
    """What was said may be said again."""
    _seen.clear()
