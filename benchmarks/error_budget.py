"""Does target_error keep its promise, and is it worth more than one density for all? The tiny Wan, one table.

    python benchmarks/error_budget.py [--steps 30 --size 16x128x128 --targets high,balanced,.08 --out PATH]

For each target, a quality level or an error, the clip is sampled twice from the same noise: steered to it,
and with as many dense first steps and a fixed density that computes as many pairs. True errors are those of
whole calls (setting `audit`: every row, exact attention in float32); "kept" is the share of calls behind the
first two sparse steps with at most 1.5 times the target. Calls that went dense count in the density, with 1,
and make no error. Also written: the true error of each layer and step (json), and a picture of it (png, with
matplotlib).
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from svg_ear_compile import quality, report, tiny_wan
from svg_ear_compile.cli import size_argument
from svg_ear_compile.errors import CallError
from svg_ear_compile.settings import QUALITY, Quality

PROMPT = (
    "a striped red star moving left in front of a plain yellow square moving right, "
    "over the cat photo panning up"
)
MIN_STEPS = 2
"""So many sparse steps may miss the target: the third is the first that knows a sparse call's error."""


@dataclass(frozen=True)
class Row:
    """One run. density: mean over the calls that may be sparse, dense ones as 1. calls: the sparse ones."""

    name: str
    target: float | None
    density: float
    psnr: float
    calls: list[CallError]


def measure(
    steps: int, size: tuple[int, int, int], targets: list[str], device: str, inner: str, guidance: float
) -> list[Row]:
    """Samples densely, steered to each target, and with the density that each of these took."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.tensor([tiny_wan.parse(PROMPT)], device=device)

    def sampled(backend: str, options: dict[str, Any] | None) -> Tensor:
        torch._dynamo.reset()
        model = tiny_wan.load_model(device, dtype)
        model.compile_repeated_blocks(backend=backend, fullgraph=True, options=options)
        return tiny_wan.sample(model, noise, ids, steps=steps, guidance=guidance)[0].transpose(0, 1)

    dense = sampled(inner, None)
    shared = {"min_tokens": 1, "num_steps": steps, "inner": inner, "strict": True, "audit": True}

    def run(name: str, options: dict[str, Any]) -> Row:
        clip = sampled("svg_ear", {**shared, **options})
        report().print()
        target = report().graphs[0].resolved.settings.target_error
        calls = [call for call in report().errors() if call.true_error is not None]
        row = Row(name, target, _density(), quality.psnr(dense, clip), calls)
        print(table([row]), flush=True)
        return row

    rows = []
    for target in targets:
        level = QUALITY.get(target, Quality(0.0, 0.2))
        rows.append(
            run(target, {"quality": target} if level.target_error else {"target_error": float(target)})
        )
        rows.append(run("the same, fixed", {"density": rows[-1].density, "dense_steps": level.dense_steps}))
    return rows


def _density() -> float:
    """Of the calls behind the warm-up, without the layers that are set to be dense."""
    (site,) = (site for site in report().sites if site.decision.rewritten)
    dense = sum(n for why, n in site.dense_calls.items() if why not in ("warm-up steps", "dense layers"))
    return ((site.measured_density or 0.0) * site.sparse_calls + dense) / (site.sparse_calls + dense)


def settled(calls: list[CallError]) -> list[CallError]:
    """Without the first two sparse steps of each layer and branch."""
    found = []
    for key in {(c.layer, c.branch) for c in calls}:
        own = sorted((c for c in calls if (c.layer, c.branch) == key), key=lambda c: c.step)
        found += own[MIN_STEPS:]
    return found


def table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        errors = sorted(c.true_error for c in row.calls if c.true_error is not None)
        ratios = [(c.true_error or 0.0) / row.target for c in settled(row.calls)] if row.target else []
        kept: list[float | None] = [None] * 3
        if ratios:
            kept = [statistics.mean(low <= r <= 1.5 for r in ratios) for low in (0, 1 / 1.5)] + [max(ratios)]
        middle, worst = (statistics.median(errors), errors[-1]) if errors else (None, None)
        cells.append([row.name, row.density, row.psnr, middle, worst, *kept])
    head = ("run", "density", "PSNR dB", "true error\nmedian", "true error\nworst", "kept\n<= 1.5x",
            "within\n1.5x", "worst\n/ target")  # fmt: skip
    return tabulate(cells, head, floatfmt=("", ".3f", ".2f", ".4f", ".4f", ".1%", ".1%", ".2f"))


def picture(rows: list[Row], path: Path) -> None:
    """True error of each call against its target; the lines are 1, 1.5 and 3 times the target."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4.5), layout="constrained")
    axes = figure.subplots()
    steered = [row for row in rows if row.target]
    for number, row in enumerate(steered):
        calls, first = settled(row.calls), row.target or 0.0
        places = [first * (0.9 + 0.2 * i / len(calls)) for i in range(len(calls))]
        axes.scatter(places, [c.true_error for c in calls], s=8, alpha=0.5, color=f"C{number}")
    ends = [min(r.target or 1 for r in steered) * 0.8, max(r.target or 0 for r in steered) * 1.25]
    for factor, style in ((1, "-"), (1.5, "--"), (3, ":")):
        axes.plot(ends, [factor * end for end in ends], "k" + style, lw=0.8, label=f"{factor:g} x target")
    axes.set(xscale="log", yscale="log", xlabel="target error", ylabel="true error of a call, all rows")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=size_argument, default=(16, 128, 128))
    parser.add_argument("--targets", type=lambda s: s.split(","), default=list(QUALITY))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--guidance", type=float, default=tiny_wan.GUIDANCE)
    parser.add_argument("--out", type=Path, default=Path("outputs/error_budget"))
    settings = vars(parser.parse_args())
    out: Path = settings.pop("out")
    rows = measure(**settings)
    print(table(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"settings": settings, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    try:
        picture(rows, out.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
