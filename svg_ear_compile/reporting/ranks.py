"""How do the ranks of one run differ? Each has its own heads, and so its own densities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from tabulate import tabulate


def gathered(totals: dict[str, Any]) -> list[dict[str, Any]]:
    """The totals of all ranks on rank 0, nothing on the others. All of them have to call it: one gather_object.

    Raises RuntimeError without a process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group in each process"
        )
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(totals, found)
    return found or []


def table(totals: list[dict[str, Any]]) -> str:
    """A row per rank."""
    rows = [
        [
            rank, t["sparse_calls"], sum(t["dense_calls"].values()), t["measured_density"], t["measured_error"],
            t["worst_error"], sum(t["fallbacks"].values()),
        ]
        for rank, t in enumerate(totals)
    ]  # fmt: skip
    head = ["rank", "sparse calls", "dense calls", "density", "median error", "largest error", "fallbacks"]
    return tabulate(rows, head, floatfmt=".3g")


def own_path(path: str) -> str:
    """Where this rank writes a report: the path, and from rank 1 on one with the rank in its name."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        return path
    whole = Path(path)
    return str(whole.with_stem(f"{whole.stem}.rank{dist.get_rank()}"))
