"""Fits the coefficients of passes/pays.py to the records of attention.py; prints them and how well they fit.

python benchmarks/fit_cost.py benchmarks/results/attention_h200.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from svg_ear_compile.passes.pays import Costs


def sizes(record: dict[str, Any]) -> tuple[int, int, int, int]:
    """B, H, L, D."""
    heads, head_dim = map(int, record["heads x d"].split(" x "))
    return 1, heads, record["tokens"], head_dim


def relative_fit(terms: list[list[float]], times: list[float]) -> np.ndarray:
    """Coefficients >= 0 that make sum((terms @ x / times - 1)^2) small: what is negative is dropped."""
    design = np.array(terms) / np.array(times)[:, None]
    scale = design.max(0)
    used = list(range(design.shape[1]))
    while True:
        found = np.linalg.lstsq(design[:, used] / scale[used], np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    x = np.zeros(design.shape[1])
    x[used] = found / scale[used]
    return x


def fit(records: list[dict[str, Any]]) -> Costs:
    """The coefficients for records of one head_dim."""
    rows = [(b * h * n * d, b * h * n * n * d) for b, h, n, d in map(sizes, records)]
    dense = relative_fit([[4 * pairs] for _, pairs in rows], [r["dense ms"] for r in records])
    terms = [[1, row, pairs, 4 * r["density"] * pairs] for (row, pairs), r in zip(rows, records, strict=True)]
    fixed, row, pair, exact = relative_fit(terms, [r["total ms"] for r in records])
    return Costs(1 / dense[0], 1 / exact, fixed, row, pair)


def main() -> None:
    records = json.loads(Path(sys.argv[1]).read_text())["records"]
    records = [r for r in records if r.get("preset", "default") == "default"]
    table = []
    for head_dim in sorted({sizes(r)[3] for r in records}):
        same = [r for r in records if sizes(r)[3] == head_dim]
        costs = fit(same)
        print(head_dim, Costs(*(float(f"{x:.4g}") for x in costs)))
        for r in same:
            told = costs.dense(*sizes(r)), costs.sparse(*sizes(r), r["density"])
            table.append([r["shape"], r["density"], r["dense ms"], told[0], r["total ms"], told[1]])
    print(tabulate(table, ("shape", "density", "dense ms", "fitted", "sparse ms", "fitted"), floatfmt=".4g"))


if __name__ == "__main__":
    main()
