"""Does target_error keep its promise, and is it worth more than one density for all? A tiny model, one table.

    python benchmarks/error_budget.py [--steps 30 --size 16x128x128 --targets high,balanced,.08 --json PATH]
    python benchmarks/error_budget.py --model hunyuan --weights outputs/tiny_hunyuan/export

For each target, a quality level or an error, clips (`tiny_clips.py`) are sampled twice from the same noise:
steered to it, and, unless --no-fixed, with as many dense first steps and a fixed density that computes as
many pairs. True errors are those of whole calls (setting `audit`: every row, exact attention in float32);
"kept" is the share of calls behind the first two sparse steps with at most 1.5 times the target. Calls that
went dense count in the density, with 1, and make no error. --json: the true error of each layer and step,
which `error_budget_plot.py` draws, of several models together.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tiny_clips import Clips, add_arguments, clips_of

from svg_ear_compile import quality, report
from svg_ear_compile.errors import CallError
from svg_ear_compile.settings import QUALITY, Quality

MIN_STEPS = 2
"""So many sparse steps may miss the target: the third is the first that knows a sparse call's error."""


@dataclass(frozen=True)
class Row:
    """One run. density: mean over the calls that may be sparse, dense ones as 1. psnr: mean over the clips.

    calls: the sparse ones, of each clip in turn.
    """

    name: str
    target: float | None
    density: float
    psnr: float
    calls: list[list[CallError]]


def measure(clips: Clips, targets: Sequence[str], fixed: bool = True) -> Iterator[Row]:
    """Samples densely, steered to each target, and with the density that each of these took."""
    dense = list(clips.sampled("dense", None))

    def run(name: str, options: dict[str, Any]) -> Row:
        calls, psnr = [], []
        sampled = clips.sampled(name, {"audit": True, **options})
        for reference, clip in zip(dense, sampled, strict=True):
            psnr.append(quality.psnr(reference, clip))
            calls.append([call for call in report().errors() if call.true_error is not None])
        target = report().graphs[0].resolved.settings.target_error
        return Row(name, target, _density(), statistics.mean(psnr), calls)

    for target in targets:
        level = QUALITY.get(target, Quality(0.0, 0.2))
        options = {"quality": target} if level.target_error else {"target_error": float(target)}
        steered = run(target, options)
        yield steered
        if fixed:
            name = f"{target}'s density, fixed"
            yield run(name, {"density": steered.density, "dense_steps": level.dense_steps})


def _density() -> float:
    """Of the calls behind the warm-up, without the layers that are set to be dense."""
    sites = [site for site in report().sites if site.decision.rewritten]
    dense = sum(
        count
        for site in sites
        for why, count in site.dense_calls.items()
        if why not in ("warm-up steps", "dense layers")
    )
    sparse = sum(site.sparse_calls for site in sites)
    computed = sum((site.measured_density or 0.0) * site.sparse_calls for site in sites)
    return (computed + dense) / (sparse + dense)


def first_and_later(calls: Sequence[CallError]) -> tuple[list[CallError], list[CallError]]:
    """The sparse calls of a clip: those of the first two sparse steps of each layer and branch, others."""
    layers: dict[tuple[int, ...], list[CallError]] = {}
    for c in sorted(calls, key=lambda c: c.step):
        layers.setdefault((c.graph, c.model, c.layer, c.site, c.branch), []).append(c)
    first, later = ([c for own in layers.values() for c in own[part]]
                    for part in (slice(MIN_STEPS), slice(MIN_STEPS, None)))  # fmt: skip
    return first, later


def ratios(row: Row) -> list[float]:
    """True error over target of the later calls of a steered run."""
    if row.target is None:
        return []
    return [(c.true_error or 0.0) / row.target for calls in row.calls for c in first_and_later(calls)[1]]


def table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        errors = sorted(c.true_error for calls in row.calls for c in calls if c.true_error is not None)
        kept: list[float | None] = [None] * 3
        if found := ratios(row):
            kept = [statistics.mean(low <= r <= 1.5 for r in found) for low in (0, 1 / 1.5)] + [max(found)]
        middle, worst = (statistics.median(errors), errors[-1]) if errors else (None, None)
        cells.append([row.name, row.density, row.psnr, middle, worst, *kept])
    head = ("run", "density", "PSNR dB", "true error\nmedian", "true error\nworst", "kept\n<= 1.5x",
            "within\n1.5x", "worst\n/ target")  # fmt: skip
    return tabulate(cells, head, floatfmt=("", ".3f", ".2f", ".4f", ".4f", ".1%", ".1%", ".2f"))


def write(rows: Sequence[Row], path: Path, told: dict[str, Any]) -> None:
    """A row a line; calls as lists of their fields' values, numbers with four digits."""
    names = [f.name for f in fields(CallError)]
    saved = [
        {**asdict(row), "calls": [[[_short(getattr(c, n)) for n in names] for c in own] for own in row.calls]}
        for row in rows
    ]
    head = json.dumps({**told, "fields": names})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "rows": [\n' + ",\n".join(map(json.dumps, saved)) + "\n]}\n")


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(told: dict[str, Any]) -> list[Row]:
    """The rows of what write() wrote."""

    def call(values: list[Any]) -> CallError:
        return CallError(**dict(zip(told["fields"], values, strict=True)))

    return [Row(**{**row, "calls": [[call(c) for c in own] for own in row["calls"]]}) for row in told["rows"]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(QUALITY))
    parser.add_argument("--fixed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    add_arguments(parser)
    parser.set_defaults(clips=1)
    arguments = parser.parse_args(argv)
    clips, rows = clips_of(arguments), []
    for row in measure(clips, arguments.targets, arguments.fixed):
        rows.append(row)
        if arguments.json is not None:
            write(rows, arguments.json, clips.told())
    print(table(rows))


if __name__ == "__main__":
    main()
