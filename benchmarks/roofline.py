"""How far are the stages of a call from what the GPU could do? A roofline from the records of attention.py.

    python benchmarks/roofline.py benchmarks/results/attention_h200.json docs/roofline.png [--shape "Wan 14B 720p"]

For each stage its work and the bytes that it has to move through memory once, counted here from the shape, and its
time as measured. "limit": the longer of work over PEAK_FLOPS and bytes over PEAK_BYTES. Prints the table as markdown;
the picture has a point for each stage and density. Only calls in cubes without first-order terms count; of a file that
compares two versions the later one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate
from video_shapes import SHAPES

QUERY_BLOCK, KEY_BLOCK = 128, 64
PEAK_FLOPS = 989e12
"""bfloat16 matrix products of an H100 or H200, by its data sheet."""
PEAK_BYTES = {"H200": 4.3e12, "H100": 3.35e12}
"""A second from memory: of an H200 as measured (attention.py), of an H100 by its data sheet."""
HEADERS = ("density", "stage", "GFLOP", "GB", "ms", "limit ms", "limit / ms", "TFLOP/s", "GB/s")


def stages(record: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(stage, floating-point operations, bytes, seconds) of a record of two-byte tensors without a mask."""
    shape = next(shape for shape in SHAPES.values() if shape.name == record["shape"])
    L, H, D = shape.length, shape.heads, shape.head_dim
    queries, keys = -(-L // QUERY_BLOCK), -(-L // KEY_BLOCK)
    rows, pairs = 2 * H * L * D, H * queries * keys  # bytes of query, key or value; pairs of blocks
    exact = 4 * H * L**2 * D * record["executed"]
    found = {
        "permute": (0, 5 * rows),  # query, key and value are read, key and value written
        "probe": (4 * H * queries * L * D, 2 * rows + 8 * pairs),  # two products with each query centroid
        "rest": (0, 16 * pairs),  # errors and gaps are read, biases and lists written
        "attend": (exact + 4 * H * L * keys * D, 4 * rows + 8 * pairs),
    }
    return [(name, *work, record[f"{name} ms"] / 1e3) for name, work in found.items()]


def table(records: list[dict[str, Any]], peak_bytes: float) -> list[list[Any]]:
    rows = []
    for record in records:
        every = stages(record)
        limits = [max(flops / PEAK_FLOPS, moved / peak_bytes) for _, flops, moved, _ in every]
        for (name, flops, moved, seconds), limit in zip(every, limits, strict=True):
            rows.append([
                record["density"], name, flops / 1e9, moved / 1e9, 1e3 * seconds, 1e3 * limit, limit / seconds,
                flops / seconds / 1e12, moved / seconds / 1e9,
            ])  # fmt: skip
        total = record["total ms"]
        share = 1e3 * sum(limits) / total
        rows.append([record["density"], "the call", "", "", total, 1e3 * sum(limits), share, "", ""])
    return rows


def picture(records: list[dict[str, Any]], peak_bytes: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    intensities = [1, PEAK_FLOPS / peak_bytes, 1e4]
    axes.plot(intensities, [min(x * peak_bytes, PEAK_FLOPS) / 1e12 for x in intensities], "k-", label="roof")
    for name in ("probe", "attend"):
        of_stage = [work for record in records for stage, *work in stages(record) if stage == name]
        points = [(flops / moved, flops / seconds / 1e12) for flops, moved, seconds in of_stage]
        axes.plot(*zip(*points, strict=True), "o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory", ylabel="TFLOP/s")
    axes.set_title(f"{records[0]['shape']}, densities {', '.join(str(r['density']) for r in records)}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--shape", default="Wan 14B 720p")
    args = parser.parse_args()
    measured = json.loads(args.records.read_text())
    measured = measured.get("after", measured)
    peak_bytes = next(peak for name, peak in PEAK_BYTES.items() if name in measured["run"]["device"])
    records = [
        r for r in measured["records"] if r["shape"] == args.shape and r.get("preset", "cubes") == "cubes"
    ]
    print(tabulate(table(records, peak_bytes), HEADERS, tablefmt="github", floatfmt=".3g"))
    picture(records, peak_bytes, args.picture)


if __name__ == "__main__":
    main()
