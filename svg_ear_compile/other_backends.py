"""SVG_EAR is set: does the program itself name another backend? Dynamo's callbacks show it; one log line says so."""

from __future__ import annotations

import logging
from typing import Any

# Compilations that reached us, and those that reached AOTAutograd, when the running one began.
_reached = 0
_before: tuple[int, int] = (0, 0)
_told = False


def reached() -> None:
    """A graph has reached our backend."""
    global _reached
    _reached += 1


def watch() -> None:
    """Watches every compilation of this process, until torch._dynamo.reset()."""
    from .compat import watch_compilations

    watch_compilations(_begin, _end)


def _count() -> tuple[int, int]:
    from .compat import counters

    return _reached, counters()["aot_autograd"]["total"]


def _begin(_: Any) -> None:
    global _before
    _before = _count()


def _end(_: Any) -> None:
    """Backends that only run a graph (eager, as torch's own helpers use) do not reach AOTAutograd."""
    global _told
    ours, compiled = _count()
    if _told or ours > _before[0] or compiled <= _before[1]:
        return
    _told = True
    logging.getLogger("svg_ear_compile").warning(
        "svg_ear: SVG_EAR is set, but the program names another backend, for one compilation at least: its attention "
        "stays as it is. SVG_EAR only changes the default: leave out backend= there (in accelerate the dynamo backend, "
        "in ComfyUI the backend of the compiling node), or name backend='svg_ear'"
    )
