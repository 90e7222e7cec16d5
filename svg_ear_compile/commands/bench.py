"""How fast is attention on this machine, dense and at a few densities, and from how many tokens on does sparsity pay?

One call of attention of --heads heads, from the tokens to the output, with blocks of neighbours in the frame grid.
Times are medians, in milliseconds; the dense ones are of scaled_dot_product_attention. Errors are relative errors of
the output on made-up tokens that vary smoothly over the clip: real models have other errors.

--out writes what a report on a GPU that nobody has timed needs: attach it to an issue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import size_argument
from . import Outcome, progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DENSITIES = (0.25, 0.15, 0.10)
GRIDS = {
    "cpu": ((4, 16, 16), (4, 32, 32), (8, 32, 32)),
    "cuda": ((8, 24, 22), (8, 32, 32), (13, 30, 45), (21, 30, 52), (21, 45, 80)),
}
"""Frames x height x width, in tokens: on a CPU 1,024 to 8,192, on a GPU 4,224 to 75,600 (Wan at 720p)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, help="default: 2 on a CPU, 12 on a GPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--grid",
        type=size_argument,
        action="append",
        help="FRAMESxHEIGHTxWIDTH in tokens; may be given again",
    )
    parser.add_argument("--out", type=Path, help="also write the JSON to this path")


def run(arguments: argparse.Namespace) -> Outcome:
    import torch

    from ..kernels.attention.choice import attention_kernel
    from ..reporting import machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = arguments.heads or (12 if device.type == "cuda" else 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [
        _row(tokens(grid, heads, arguments.head_dim, device, dtype), grid, arguments.repeats)
        for grid in progress(arguments.grid or GRIDS[device.type], "grids")
    ]
    least = {str(density): break_even(rows, str(density)) for density in DENSITIES}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads,
        "head_dim": arguments.head_dim,
    }
    kernel = attention_kernel(device, dtype, arguments.head_dim)
    machines = {"kernel": kernel._asdict(), "versions": machine.versions(), "hardware": machine.hardware()}
    data = {**about, **machines, "rows": rows, "least_tokens": least}
    if arguments.out:
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    return Outcome(data, _text(data))


def tokens(
    grid: tuple[int, int, int], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value [1, heads, tokens, head_dim]: waves over the grid, and noise."""
    import torch

    g = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(*(torch.arange(n) / n for n in grid))
    waves = 2 * torch.pi * torch.randn(3, heads * head_dim, generator=g)
    smooth = (places @ waves).sin().view(-1, heads, head_dim).transpose(0, 1)[None]
    noise = torch.randn(3, *smooth.shape, generator=g)
    return [(1.5 * smooth + 0.5 * part).to(device, dtype) for part in noise]


def _row(inputs: list[Tensor], grid: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    import torch

    from ..functional import attention

    query, key, value = inputs
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        exact, dense = _timed(lambda: sdpa(query, key, value), repeats)
        row: dict[str, Any] = {"grid": grid, "tokens": exact.shape[2], "dense_ms": dense, "sparse": {}}
        for density in DENSITIES:
            sparse = partial(attention, query, key, value, grid=grid, density=density)
            out, ms = _timed(sparse, repeats)
            error = ((out.float() - exact.float()).norm() / exact.float().norm()).item()
            row["sparse"][str(density)] = {"ms": ms, "error": error}
    return row


def _timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """What it returns, and its median time in milliseconds after one call that compiles."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    out, times = call(), []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return out, statistics.median(times)


def break_even(rows: list[dict[str, Any]], density: str) -> int | None:
    """From how many tokens on sparse calls take less time than dense ones; None if they do not for the longest.

    Between two lengths the ratio of the times is taken to be linear.
    """
    points = sorted((row["tokens"], row["sparse"][density]["ms"] / row["dense_ms"]) for row in rows)
    if points[-1][1] >= 1:
        return None
    above = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
    if not above:
        return int(points[0][0])
    (a, high), (b, low) = points[above[-1]], points[above[-1] + 1]
    return round(a + (b - a) * (high - 1) / (high - low))


def _text(data: dict[str, Any]) -> str:
    from tabulate import tabulate

    head = ["tokens", "dense ms", *(f"{density:g}" for density in DENSITIES)]
    rows = [
        [row["tokens"], f"{row['dense_ms']:.3g}"]
        + [
            f"{x['ms']:.3g} ms ({row['dense_ms'] / x['ms']:.2f}x), error {x['error']:.2g}"
            for x in row["sparse"].values()
        ]
        for row in data["rows"]
    ]
    lines = [
        f"{data['device']}, {data['dtype']}, {data['heads']} heads of {data['head_dim']}",
        tabulate(rows, head),
    ]
    for density, least in data["least_tokens"].items():
        lines.append(
            f"density {density}: does not pay at these lengths" if least is None
            else f"density {density}: pays from {least:,} tokens on; to use it: SVG_EAR_MIN_TOKENS={least}"
        )  # fmt: skip
    return "\n".join(lines)
