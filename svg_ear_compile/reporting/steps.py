"""How long did each step of the last generation take?"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .records import GraphRecord


@dataclass(frozen=True)
class StepTime:
    """seconds: from the last attention call of the step before to the last of this one, as the host saw it.

    On a GPU the host may be a step ahead. sparse: the share of the step's attention calls that ran sparse.
    trials: whether some of them also tried forms or densities, which takes time.
    """

    step: int
    seconds: float
    sparse: float
    trials: bool


def step_times(graphs: Sequence[GraphRecord]) -> list[StepTime]:
    """All steps but the first, which compiles and whose beginning is not known."""
    last = max((max(graph.logs) for graph in graphs if graph.logs), default=None)
    logs = [log for graph in graphs for log in (graph.last_generation() if last in graph.logs else ())]
    ends: dict[int, float] = {}
    sparse: dict[int, list[bool]] = {}
    tried = {log.step for log in logs if log.decision.measure is not None and log.decision.measure.densities}
    for log in logs:
        ends[log.step] = max(log.end, ends.get(log.step, 0.0))
        sparse.setdefault(log.step, []).append(not log.decision.dense)
    steps = sorted(ends)
    return [
        StepTime(b, ends[b] - ends[a], statistics.mean(sparse[b]), b in tried)
        for a, b in itertools.pairwise(steps)
    ]


def summary(times: Sequence[StepTime]) -> dict[str, Any]:
    """Median seconds of dense and of mostly sparse steps, those with trials left out; None where there are none."""
    dense = [t.seconds for t in times if not t.sparse and not t.trials]
    sparse = [t.seconds for t in times if t.sparse > 0.5 and not t.trials]
    return {
        "dense_step_seconds": statistics.median(dense) if dense else None,
        "sparse_step_seconds": statistics.median(sparse) if sparse else None,
    }
