"""The picture and the tables of methods in docs/QUALITY.md, from what quality.py and attention.py wrote.

    python benchmarks/quality_plot.py --quality benchmarks/results/quality_{wan,hunyuan,cogvideox}.json \
        --attention benchmarks/results/attention_presets.json --measuring benchmarks/results/measuring.json \
        --png docs/quality.png --page docs/QUALITY.md

The tables go between the page's two lines `<!-- measured -->`. The picture: one column a model; PSNR against the
measured density above, against the time of one attention call (quality_curves.py) below.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from quality import DENSE_STEPS, RELEASED, RUNS, Row
from quality_curves import SHAPE, Spread, Times, compared, curve, gain_at_equal_time, time_at_equal_quality
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "default", ("svg_ear", "svg2", *RELEASED)
BRANCHES = 2
"""Calls of a layer in a step: guidance."""


def table(rows: Sequence[Row], times: Times) -> str:
    head = (
        "model", "run", "density", "PSNR dB", "worst", "SSIM", "error", "ms a call", "of dense",
        "clusters free",
    )  # fmt: skip
    cells = []
    for r in rows:
        call, free = times.of(r), times.of(r, free=True)
        of_dense = None if call is None else call / times.dense
        cells.append(
            (
                r.model, r.name, r.density, statistics.mean(r.psnr), min(r.psnr), statistics.mean(r.ssim),
                r.error, call, of_dense, free,
            )
        )  # fmt: skip
    formats = ("", "", ".3f", ".2f", ".2f", ".4f", ".4f", ".1f", ".2f", ".1f")
    return tabulate(cells, head, tablefmt="github", floatfmt=formats, missingval="-")


def comparison(rows: Sequence[Row], times: Times) -> str:
    """The default against each paper, model by model: least / mean / most over what both curves cover."""
    cells = []
    for model in dict.fromkeys(row.model for row in rows):
        for run in THEIRS:
            for free in (False, True):
                of = {name: [r for r in rows if (r.model, r.name) == (model, name)] for name in (OURS, run)}
                ours, theirs = (curve(x, times, free) for x in (of[OURS], compared(of[run])))
                known = len(ours) > 1 and len(theirs) > 0
                cells.append(
                    (
                        model, run, "free" if free else "counted",
                        _spread(gain_at_equal_time(ours, theirs), "+.1f") if known else "-",
                        _spread(time_at_equal_quality(ours, theirs), ".2f") if known else "-",
                    )
                )  # fmt: skip
    head = ("model", "against", "its clustering", "dB more at equal time", "times as fast at equal PSNR")
    return tabulate(cells, head, tablefmt="github", disable_numparse=True)


def _spread(found: Spread | None, how: str) -> str:
    return "nothing in common" if found is None else " / ".join(format(x, how) for x in found)


def picture(rows: Sequence[Row], times: Times, path: Path) -> None:
    names = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(
        2, len(names), figsize=(0.5 + 3.5 * len(names), 7.2), sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    shown: dict[str, Any] = {}
    for (above, below), model in zip(axes.T, names, strict=True):
        for number, run in enumerate((*RUNS, *RELEASED)):
            points = sorted((r for r in rows if (r.model, r.name) == (model, run)), key=lambda r: r.density)
            decibels = [statistics.mean(r.psnr) for r in points]
            color = f"C{number}"
            (shown[run],) = above.plot([r.density for r in points], decibels, "o-", color=color)
            below.plot(*_line(curve(points, times)), "o-", color=color)
            if run in THEIRS:
                free = _line(curve(points, times, free=True))
                (shown[f"{run}, clusters free"],) = below.plot(*free, "o:", color=color, mfc="none")
        above.set(title=model, xlabel="density")
        below.set(xlabel=f"ms of one attention call at {SHAPE}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR against the dense clip, dB")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [time for time, _ in points], [psnr for _, psnr in points]


def between(page: str, mark: str, text: str) -> str:
    """The page with this text between its first two lines `mark`."""
    before, _, after = page.split(f"{mark}\n", 2)
    return f"{before}{mark}\n{text}\n{mark}\n{after}"


def how(told: Sequence[dict[str, Any]]) -> str:
    """On what all files were measured, one line for each that differs."""
    lines = {f"{t['hardware']}, torch {t['torch']}: {_settings(t['settings'])}" for t in told}
    return "  \n".join(sorted(lines))


def _settings(settings: dict[str, Any]) -> str:
    """All but what the tables say."""
    said = {name: value for name, value in settings.items() if name not in ("model", "device")}
    said["size"] = " x ".join(str(n) for n in said["size"])
    return ", ".join(f"{name} {value}" for name, value in said.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quality", type=Path, nargs="+", required=True)
    parser.add_argument("--attention", type=Path, required=True)
    parser.add_argument("--measuring", type=Path, required=True)
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    arguments = parser.parse_args(argv)
    attention, measuring = _read([arguments.attention, arguments.measuring])
    told = _read(arguments.quality)
    steps = told[0]["settings"]["steps"]
    sparse = BRANCHES * (steps - round(DENSE_STEPS * steps))
    times = Times(attention["records"], measuring["records"], sparse)
    rows = [Row(**row) for t in told for row in sorted(t["rows"], key=_place)]
    picture(rows, times, arguments.png)
    timed = (
        f"Attention time: one call at {SHAPE}, {attention['run']['device']}, dense {times.dense:.1f} ms. "
        f"Choosing forms takes {times.choosing:.0f} ms of a layer in a generation, spread over {sparse} sparse calls."
    )
    shown = f"![PSNR against density, and against the time of an attention call]({arguments.png.name})"
    measured = "\n\n".join([how(told), timed, table(rows, times), comparison(rows, times), shown])
    arguments.page.write_text(between(arguments.page.read_text(), "<!-- measured -->", measured))


def _place(row: dict[str, Any]) -> tuple[float, int]:
    """In the table of a model: the largest density first, then as in RUNS; at last those that found theirs."""
    return -(row["asked"] or 0.0), [*RUNS, *RELEASED].index(row["name"])


def _read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in paths]


if __name__ == "__main__":
    main()
