"""The picture and the table of docs/PERFORMANCE.md, from the records that attention.py wrote.

    python benchmarks/attention_plot.py benchmarks/results/attention_h200.json docs/performance.png

Prints the table as markdown. The picture: milliseconds per head against tokens, dense and at each density,
for the shapes of head_dim 128 (both axes logarithmic), so that the shapes lie on one line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Of a record, how it is written, and what it is called.
COLUMNS = (
    ("density", "g", "density"), ("permute ms", ".2f", "permute"), ("probe ms", ".2f", "probe"),
    ("rest ms", ".2f", "routing, rest"), ("attend ms", ".2f", "attend"), ("total ms", ".2f", "total ms"),
    ("dense ms", ".1f", "dense ms"), ("speed-up", ".2f", "speed-up"), ("limit", ".1f", "limit"),
    ("TFLOP/s", ".0f", "TFLOP/s"), ("error", ".3f", "error"), ("extra GB", ".2f", "extra GB"),
)  # fmt: skip


def markdown(records: list[dict[str, Any]]) -> str:
    """The table of the page: one row a record; a speed-up whose check failed is written out as that."""
    lines = [
        "| shape | " + " | ".join(name for *_, name in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for r in records:
        cells = [r[key] if isinstance(r[key], str) else format(r[key], how) for key, how, _ in COLUMNS]
        lines.append(f"| {r['shape']}, {r['tokens']:,} x {r['heads x d']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(records: list[dict[str, Any]], path: Path) -> None:
    """Time against tokens."""
    wide = [r for r in records if r["heads x d"].endswith("x 128") and isinstance(r["speed-up"], float)]
    heads = [int(r["heads x d"].split(" x ")[0]) for r in wide]
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    dense = {r["tokens"]: r["dense ms"] / h for r, h in zip(wide, heads, strict=True)}
    axes.plot(*zip(*sorted(dense.items()), strict=True), "k.-", label="dense (best of cuDNN and flash)")
    for density in sorted({r["density"] for r in wide}, reverse=True):
        points = {
            r["tokens"]: r["total ms"] / h
            for r, h in zip(wide, heads, strict=True)
            if r["density"] == density
        }
        axes.plot(*zip(*sorted(points.items()), strict=True), ".-", label=f"svg_ear, density {density:g}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per head", title="One attention call")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    told = json.loads(source.read_text())
    print(f"{told['run']['device']}, torch {told['run']['torch']}, triton {told['run']['triton']}\n")
    print(markdown(told["records"]))
    picture(told["records"], target)


if __name__ == "__main__":
    main()
