"""The picture and the table of docs/QUALITY.md, from the files that quality.py --json wrote.

    python benchmarks/quality_plot.py benchmarks/results/quality_h200_*.json docs/quality.png docs/QUALITY.md

The table goes between the page's first two lines `<!-- measured -->`. The picture: one column a model; PSNR
against the measured density above, against the time of a step (over that of a dense one) below.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from quality import RUNS, Row, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARK = "<!-- measured -->"


def picture(rows: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(
        2,
        len(names),
        figsize=(0.5 + 3.5 * len(names), 6),
        sharey=True,
        squeeze=False,
        constrained_layout=True,
    )
    for (above, below), model in zip(axes.T, names, strict=True):
        dense = next(row.step_seconds for row in rows if row.model == model and row.name == "dense")
        for run in RUNS:
            points = sorted((r for r in rows if (r.model, r.name) == (model, run)), key=lambda r: r.density)
            decibels = [statistics.mean(r.psnr) for r in points]
            above.plot([r.density for r in points], decibels, "o-", label=run)
            below.plot([r.step_seconds / dense for r in points], decibels, "o-", label=run)
        above.set(title=model, xlabel="density")
        below.set(xlabel="time of a step / dense step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR against the dense clip, dB")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    *sources, png, page = map(Path, sys.argv[1:] if argv is None else argv)
    told = [json.loads(source.read_text()) for source in sources]
    how = {f"{t['hardware']}, torch {t['torch']}: " + _settings(t["settings"]) for t in told}
    rows = [
        Row(**{**row, "psnr": [math.inf if p is None else p for p in row["psnr"]]})
        for t in told
        for row in t["rows"]
    ]
    picture(rows, png)
    before, _, after = page.read_text().split(f"{MARK}\n", 2)
    measured = "\n".join([*sorted(how), "", table(rows, "github")])
    page.write_text(f"{before}{MARK}\n{measured}\n{MARK}\n{after}")


def _settings(settings: dict[str, Any]) -> str:
    """All but what the table says."""
    said = {name: value for name, value in settings.items() if name not in ("model", "density", "device")}
    return ", ".join(f"{name} {value}" for name, value in said.items())


if __name__ == "__main__":
    main()
