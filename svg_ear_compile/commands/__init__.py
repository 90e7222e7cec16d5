"""The commands of `svg-ear`, one file each: `add_arguments(parser)`, and `run(arguments)` that returns an Outcome.

Nothing here imports torch at the top: `svg-ear run` sets variables that must be there before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Outcome:
    """What a command found: data for --json, text for people, and the exit status."""

    data: Any
    text: str
    status: int = 0


def progress(items: Iterable[_T], name: str) -> Iterable[_T]:
    """With a bar on a terminal, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=name, disable=None, leave=False)
