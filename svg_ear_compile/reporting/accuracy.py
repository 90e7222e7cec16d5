"""What was the error of each layer at each step of its last generation, and at which density?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from .records import GraphRecord


@dataclass(frozen=True)
class CallError:
    """One attention site in one call. Errors are relative errors of the output over all heads.

    layer: the number of the attention layer in its model. branch: the number of the call in its step (1 is often the
    unconditional one). dense: why it ran dense; "" if it did not. density: its budget; None if dense, or as routed.
    error, worst_head: measured on sampled rows; None if not measured. true_error: over all rows, with the setting
    `audit`. split_share, first_order_share: the share of heads that use splits, and first-order terms.
    """

    graph: int
    site: int
    model: int
    layer: int
    branch: int
    step: int
    dense: str
    density: float | None
    target: float | None
    error: float | None
    worst_head: float | None
    true_error: float | None
    split_share: float = 0.0
    first_order_share: float = 0.0


def call_errors(graph: GraphRecord) -> list[CallError]:
    """Sorted by layer, branch and step. Waits for the device."""
    target = graph.resolved.settings.target_error
    found = []
    for log in graph.last_generation():
        error, true, decision = log.error(), log.true_error(), log.decision
        found.append(
            CallError(
                graph.number, log.site, log.model, log.layer, log.branch, log.step, decision.dense,
                decision.density, target,
                None if error is None else error.call, None if error is None else error.worst_head,
                None if true is None else true.call, _share(decision.split_heads), _share(decision.first_order),
            )
        )  # fmt: skip
    return sorted(found, key=lambda e: (e.graph, e.model, e.layer, e.site, e.branch, e.step))


def _share(heads: tuple[bool, ...] | None) -> float:
    """None: all."""
    return 1.0 if heads is None else sum(heads) / max(len(heads), 1)


def summary(errors: Sequence[CallError]) -> dict[str, Any]:
    """The number of measured calls, their median and largest error.

    split_share, first_order_share: means over all sparse calls.
    """
    measured = [e.error for e in errors if e.error is not None]
    sparse = [e for e in errors if not e.dense]
    return {
        "split_share": statistics.mean(e.split_share for e in sparse) if sparse else 0.0,
        "first_order_share": statistics.mean(e.first_order_share for e in sparse) if sparse else 0.0,
        "measured_calls": len(measured),
        "measured_error": statistics.median(measured) if measured else None,
        "worst_error": max(measured, default=None),
    }


def table(errors: list[CallError]) -> str:
    """A row per layer and branch, and a column per step in which an error was measured: density and error."""
    steps = sorted({e.step for e in errors if e.error is not None})
    rows: dict[tuple[int, ...], dict[int, str]] = {}
    for e in errors:
        rows.setdefault((e.graph, e.model, e.layer, e.site, e.branch), {})[e.step] = _cell(e)
    if not steps:
        return "svg_ear: no error was measured"
    several = len({key[:2] for key in rows}) > 1
    head = ["layer", "branch", *(f"step {step + 1}" for step in steps)]
    cells = [
        [f"{graph}.{model}.{layer}" if several else layer, branch, *(row.get(step, "") for step in steps)]
        for (graph, model, layer, _, branch), row in rows.items()
    ]
    targets = {e.target for e in errors if e.target is not None}
    about = "density: measured relative error" + (f", target {min(targets):g}" if len(targets) == 1 else "")
    return f"{about}\n" + tabulate(cells, head, disable_numparse=True)


def _cell(e: CallError) -> str:
    if e.dense:
        return "dense"
    density = "as routed" if e.density is None else f"{e.density:.2f}"
    return density if e.error is None else f"{density}: {e.error:.3f}"
