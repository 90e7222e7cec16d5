"""How are the decisions and counts of all compiled graphs shown? As a table, and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import accuracy, machine, ranks, steps
from .accuracy import CallError
from .page import page
from .records import GraphRecord, SiteRecord, live_records

SCHEMA_VERSION = 3
HEAD = (
    "site", "module", "kind", "q x k", "heads x dim", "mask", "verdict", "density",
    "GFLOP\ndense", "GFLOP\nplanned", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one graph, with its cost.

    planned_density: as set; None if the routing finds its own, or if target_error is set instead.
    flops_dense, flops_planned: of one call; planned equals dense if the density is not known.
    measured_density, executed_area: means over the sparse calls so far; executed also counts the padding of tiles.
    mean_density: over all calls, where a dense call counts as 1. These three are None before the first call.
    dense_calls: the number of dense calls by reason.
    """

    graph: int
    decision: SiteRecord
    planned_density: float | None
    target_error: float | None
    flops_dense: int
    flops_planned: int
    sparse_calls: int
    dense_calls: dict[str, int]
    measured_density: float | None
    executed_area: float | None
    mean_density: float | None

    @property
    def calls(self) -> int:
        return self.sparse_calls + sum(self.dense_calls.values())

    @property
    def flops_computed(self) -> int:
        """Of all calls so far."""
        sparse = self.decision.flops_planned(self.measured_density)
        return sparse * self.sparse_calls + self.flops_dense * (self.calls - self.sparse_calls)


@dataclass(frozen=True)
class Report:
    """Everything since the last torch._dynamo.reset(): the graphs that still exist, their sites and counts."""

    graphs: tuple[GraphRecord, ...]
    sites: list[SiteReport] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        rewritten = [site for site in self.sites if site.decision.rewritten]
        dense, total = sum(s.flops_dense for s in rewritten), sum(s.flops_dense for s in self.sites)
        reasons: Counter[str] = sum((Counter(s.dense_calls) for s in rewritten), Counter())
        return {
            "sites": len(self.sites),
            "rewritten": len(rewritten),
            "coverage": dense / total if total else 0.0,
            "flops_dense": total,
            "flops_planned": sum(s.flops_planned for s in self.sites),
            "flops_of_calls": sum(s.flops_dense * s.calls for s in rewritten),
            "flops_computed": sum(s.flops_computed for s in rewritten),
            "sparse_calls": sum(s.sparse_calls for s in rewritten),
            "dense_calls": dict(reasons),
            "measured_density": _mean([s.measured_density for s in rewritten]),
            "executed_area": _mean([s.executed_area for s in rewritten]),
            "mean_density": _mean([s.mean_density for s in rewritten]),
            **accuracy.summary(self.errors()),
            "fallbacks": dict(sum((graph.fallbacks for graph in self.graphs), Counter())),
        }

    def errors(self) -> list[CallError]:
        """Density, target and measured error of each layer at each step of its last generation."""
        return [error for graph in self.graphs for error in accuracy.call_errors(graph)]

    def print_errors(self) -> None:
        print(accuracy.table(self.errors()))

    def print_ranks(self) -> None:
        """Prints a row for each rank of a distributed run, on rank 0. All ranks have to call it (ranks.py)."""
        if totals := ranks.gathered(self.totals()):
            print(ranks.table(totals))

    def data(self) -> dict[str, Any]:
        """The report as JSON has it. `schema` increases whenever a key goes away or changes its meaning."""
        graphs = []
        for graph in self.graphs:
            sites = [{**asdict(s.decision), **asdict(s)} for s in self.sites if s.graph == graph.number]
            for site in sites:
                del site["decision"], site["graph"]
            graphs.append(
                {
                    "graph": graph.number,
                    "switch": graph.resolved.switch,
                    "settings": asdict(graph.resolved.settings),
                    "sources": graph.resolved.sources,
                    "failure": graph.failure,
                    "other_attention": graph.other_attention,
                    "graph_breaks": graph.graph_breaks,
                    "steps": graph.steps,
                    "kernels": graph.kernels,
                    "grid": graph.grid,
                    "packed": graph.packed,
                    "fallbacks": dict(graph.fallbacks),
                    "sites": sites,
                    "errors": [asdict(error) for error in accuracy.call_errors(graph)],
                }
            )
        times = steps.step_times(self.graphs)
        return {
            "schema": SCHEMA_VERSION,
            "svg_ear_compile": version("svg-ear-compile"),
            "written": datetime.now().astimezone().isoformat(" ", "seconds"),
            "versions": machine.versions(),
            "hardware": machine.hardware(),
            "peak_memory_gib": machine.peak_memory(),
            "graphs": graphs,
            "totals": self.totals(),
            "time": {
                "passes_seconds": sum(graph.passes_seconds for graph in self.graphs),
                "compiling_seconds": sum(graph.compiling_seconds for graph in self.graphs),
                **steps.summary(times),
                "steps": [asdict(t) for t in times],
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.data(), indent=1)

    def to_html(self) -> str:
        """The report as one web page without external parts."""
        lines = [*self._summary(), *self._failures(), *self._run_time()]
        return page(self.data(), HEAD, self._rows(), lines)

    def write(self, path: str | Path) -> None:
        """As a web page, if the path ends in .html; else as JSON."""
        Path(path).write_text(self.to_html() if str(path).endswith(".html") else self.to_json() + "\n")

    def print(self) -> None:
        print(self)

    def __str__(self) -> str:
        if not self.sites:
            others = sorted({name for graph in self.graphs for name in graph.other_attention})
            first = "svg_ear: " + (
                f"no scaled_dot_product_attention call, but {', '.join(others)}" if others
                else f"{len(self.graphs)} compiled graphs, no attention in them" if self.graphs
                else "nothing compiled yet: call the model first"
            )  # fmt: skip
            breaks = dict.fromkeys(x for graph in self.graphs for x in graph.graph_breaks)
            return "\n".join([first, *(f"graph break: {x}" for x in breaks), *self._failures()])
        widths = [None] * 5 + [18] + [None] * 4 + [36]
        table = tabulate(self._rows(), HEAD, maxcolwidths=widths, disable_numparse=True)
        return "\n".join([table, *self._summary(), *self._failures(), *self._run_time()])

    def _rows(self) -> list[list[str]]:
        """Sites that differ only in the numbers of their module paths share a row."""
        rows: dict[tuple[Any, ...], list[SiteReport]] = {}
        for site in self.sites:
            d = site.decision
            row = (
                re.sub(r"\b\d+\b", "*", d.module_path), d.kind, f"{d.q_len} x {d.k_len}",
                f"{d.heads} x {d.head_dim}", d.mask, "sparse" if d.rewritten else "dense", _density(site),
                f"{site.flops_dense / 1e9:.3g}", f"{site.flops_planned / 1e9:.3g}", d.sentence,
            )  # fmt: skip
            rows.setdefault((site.graph, *row), []).append(site)
        table = []
        for (graph, path, *rest), group in rows.items():
            number = f"{graph}.{group[0].decision.site}" + (f" ({len(group)}x)" if len(group) > 1 else "")
            name = path if len(group) > 1 else group[0].decision.module_path
            table.append([number, name, *rest])
        return table

    def _summary(self) -> list[str]:
        t = self.totals()
        count, coverage, verb = t["rewritten"], t["coverage"], "rewritten"
        would = [s.flops_dense for s in self.sites if s.decision.reason == "REPORT_ONLY"]
        if would:
            count, coverage, verb = len(would), sum(would) / t["flops_dense"], "would be rewritten"
        lines = [
            f"{count} of {t['sites']} attention sites {verb}, with {coverage:.1%} of the attention FLOPs"
        ]
        if any(s.planned_density is not None for s in self.sites):
            lines[0] += f"; the plan computes {t['flops_planned'] / t['flops_dense']:.1%} of all FLOPs"
        others = dict.fromkeys(name for graph in self.graphs for name in graph.other_attention)
        lines += [f"left as it is: {name}" for name in others]
        hints = {d.sentence.split(" (")[0]: d.hint for d in (s.decision for s in self.sites) if d.hint}
        return lines + [f"{sentence}: {hint}" for sentence, hint in hints.items()]

    def _failures(self) -> list[str]:
        return [
            f"graph {g.number} was left as it was, because of {g.failure}" for g in self.graphs if g.failure
        ]

    def _run_time(self) -> list[str]:
        t = self.totals()
        dense = sum(t["dense_calls"].values())
        if not dense + t["sparse_calls"]:
            return []
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(t["dense_calls"].items()))
        lines = [f"calls of rewritten sites: {t['sparse_calls']} sparse, {dense} dense"]
        lines[0] += f" ({why})" if why else ""
        if t["measured_density"] is not None:
            lines.append(
                f"density: {t['measured_density']:.3f} in sparse calls, {t['executed_area']:.3f} executed "
                f"with padding, {t['mean_density']:.3f} over all calls"
            )
        if t["split_share"]:
            lines.append(
                f"order: {t['split_share']:.0%} of the heads use splits instead of cubes, which lowers their error"
            )
        if t["first_order_share"]:
            lines.append(
                f"first-order terms: {t['first_order_share']:.0%} of the heads use them, which lowers their error"
            )
        if t["measured_calls"]:
            targets = sorted({s.target_error for s in self.sites if s.target_error is not None})
            lines.append(
                f"error: {t['measured_error']:.3g} median, {t['worst_error']:.3g} largest, measured "
                f"in {t['measured_calls']} sparse calls of the last generation"
                + "".join(f"; target {target:g}" for target in targets)
            )
        guarded = sorted({(e.model, e.layer) for e in self.errors() if e.dense.startswith("its error was")})
        if guarded:
            names = ", ".join(f"{model}.{layer}" for model, layer in guarded)
            lines.append(
                f"dense for the rest of the generation because of their errors: layers {names} (model.layer)"
            )
        lines += [f"fallbacks: {count} x {reason}" for reason, count in t["fallbacks"].items()]
        grids = {g.grid: g for g in self.graphs if g.grid}
        lines += [f"frame grid: {t} x {h} x {w}, read off the rotary tables" for t, h, w in grids]
        lines += dict.fromkeys(f"packed sequence: {g.packed}" for g in self.graphs if g.packed)
        lines += [f"kernel: {k}" for k in dict.fromkeys(k for g in self.graphs for k in g.kernels)]
        return lines + list(dict.fromkeys(f"steps: {g.steps}" for g in self.graphs if g.steps))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _density(site: SiteReport) -> str:
    if not site.decision.rewritten:
        return ""
    if site.target_error is not None:
        return f"to {site.target_error:g}"
    return "as routed" if site.planned_density is None else f"{site.planned_density:g}"


def _site_report(graph: GraphRecord, site: SiteRecord) -> SiteReport:
    settings = graph.resolved.settings
    density, target = (settings.density, settings.target_error) if site.rewritten else (None, None)
    exact, executed, pairs = graph.measured(site.site)
    sparse, dense = graph.sparse[site.site], dict(graph.dense.get(site.site, {}))
    share = exact / pairs if pairs else None
    calls = sparse + sum(dense.values())
    mean = ((share or 0.0) * sparse + calls - sparse) / calls if calls and (pairs or not sparse) else None
    return SiteReport(
        graph.number, site, density, target, site.flops_dense, site.flops_planned(density), sparse, dense,
        share, executed / pairs if pairs else None, mean,
    )  # fmt: skip


def report(graphs: list[GraphRecord] | None = None) -> Report:
    """The report over all graphs compiled since the last torch._dynamo.reset(), or over some."""
    graphs = live_records() if graphs is None else graphs
    return Report(tuple(graphs), [_site_report(graph, site) for graph in graphs for site in graph.sites])
