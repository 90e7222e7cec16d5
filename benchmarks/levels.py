"""What does each quality level give at equal cost, with many steps and with few? Trained tiny models.

    python benchmarks/levels.py --json benchmarks/results/levels_wan.json [--step-counts 30,8 --clips 4]
    python benchmarks/levels.py --model hunyuan --weights outputs/tiny_hunyuan/export --json ...

For each number of steps the clips (`tiny_clips.py`) are sampled densely, at every level with nothing else
told, and with one fixed density without and with dense first steps: the curves that a level is compared with
(`equal_cost.py`). A clip's cost: computed query-key pairs over those of all attention calls that may be
sparse; dense calls count 1. Its error: the root mean square over its sparse calls of their true errors, each
over all rows (setting `audit`), which the level's target is a promise of.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from equal_cost import comparison, rows_of, summary
from tiny_clips import Clips, add_arguments, clips_of
from torch import Tensor

from svg_ear_compile import quality, report
from svg_ear_compile.presets import QUALITY

STEP_COUNTS = (30, 8)
WARM_UPS = (0.0, 0.1, 0.2)
DENSITIES = (0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.8)


class Run(NamedTuple):
    """One level, or one fixed density; lists have a value a clip.

    level: "": a fixed density. asked: the level's target, or the density. warm_up: of a fixed density, the
    share of dense first steps. psnr: infinite where all was dense. error: None where nothing was sparse, or
    not audited. density: of the sparse calls. dense: calls of all clips by reason. measured: calls that were.
    """

    model: str
    steps: int
    level: str
    asked: float
    warm_up: float | None
    psnr: list[float]
    ssim: list[float]
    cost: list[float]
    density: list[float | None]
    error: list[float | None]
    sparse: int
    measured: int
    dense: dict[str, int]


class Spent(NamedTuple):
    """Of the calls of rewritten sites so far. pairs: computed in sparse calls, a call's pairs as 1."""

    pairs: float
    sparse: int
    dense: Counter[str]

    @classmethod
    def so_far(cls) -> Spent:
        sites = [site for site in report().sites if site.decision.rewritten]
        dense: Counter[str] = sum((Counter(site.dense_calls) for site in sites), Counter())
        pairs = sum((site.measured_density or 0.0) * site.sparse_calls for site in sites)
        return cls(pairs, sum(site.sparse_calls for site in sites), dense)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.pairs - other.pairs, self.sparse - other.sparse, self.dense - other.dense)

    @property
    def cost(self) -> float:
        dense = self.dense.total()
        return (self.pairs + dense) / (self.sparse + dense)


def measure(
    clips: Clips,
    levels: Sequence[str],
    step_counts: Sequence[int],
    densities: Sequence[float] = DENSITIES,
    warm_ups: Sequence[float] = WARM_UPS,
) -> Iterator[Run]:
    """A run as soon as it is known."""
    for steps in step_counts:
        some = replace(clips, steps=steps)
        dense = list(some.sampled(f"dense, {steps} steps", None))
        for level in levels:
            yield _run(some, dense, {"quality": level, "audit": True}, level)
        for warm_up in warm_ups:
            for density in densities:
                yield _run(some, dense, {"density": density, "dense_steps": warm_up})


def _run(clips: Clips, dense: list[Tensor], options: dict[str, Any], level: str = "") -> Run:
    asked = QUALITY[level] if level else options["density"]
    warm_up = options.get("dense_steps")
    run = Run(clips.model, clips.steps, level, asked, warm_up, [], [], [], [], [], 0, 0, {})
    label = f"{level or asked}, {clips.steps} steps"
    before, measured = Spent(0.0, 0, Counter()), 0
    for reference, clip in zip(dense, clips.sampled(label, options), strict=True):
        run.psnr.append(quality.psnr(reference, clip))
        run.ssim.append(quality.ssim(reference, clip))
        calls = report().errors()
        squares = [call.true_error**2 for call in calls if call.true_error is not None]
        run.error.append(math.sqrt(statistics.mean(squares)) if squares else None)
        measured += sum(call.error is not None for call in calls)
        after = Spent.so_far()
        own = after - before
        run.cost.append(own.cost)
        run.density.append(own.pairs / own.sparse if own.sparse else None)
        before = after
    return run._replace(sparse=before.sparse, measured=measured, dense=dict(before.dense))


def write(runs: Sequence[Run], path: Path, told: dict[str, Any]) -> None:
    """A run a line, numbers with five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_short(run._asdict())) for run in runs)
    path.write_text(f'{json.dumps(told)[:-1]}, "runs": [\n{lines}\n]}}\n')


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def read(told: dict[str, Any]) -> list[Run]:
    """The runs of what write() wrote."""
    return [
        Run(**{**run, "psnr": [math.inf if p is None else p for p in run["psnr"]]}) for run in told["runs"]
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",") if part]

    parser.add_argument("--levels", type=numbers(str), default=list(QUALITY))
    parser.add_argument("--step-counts", type=numbers(int), default=list(STEP_COUNTS))
    parser.add_argument("--densities", type=numbers(float), default=list(DENSITIES))
    parser.add_argument("--warm-ups", type=numbers(float), default=list(WARM_UPS))
    parser.add_argument("--before", type=Path, help="a file that --json wrote: the levels as they were")
    parser.add_argument("--json", type=Path)
    add_arguments(parser)
    told = parser.parse_args(argv)
    clips, runs = clips_of(told), []
    for run in measure(clips, told.levels, told.step_counts, told.densities, told.warm_ups):
        runs.append(run)
        if told.json is not None:  # what is cut short has not been in vain
            write(runs, told.json, clips.told())
    before = read(json.loads(told.before.read_text())) if told.before else []
    rows = rows_of(runs, before)
    print(comparison(rows), summary(rows), sep="\n\n")


if __name__ == "__main__":
    main()
