"""How close do sparse clips come to dense ones? The tiny Wan model, several prompts, one table.

    python benchmarks/quality.py [--steps 30 --size 16x128x128 --density .25 --json PATH]

Every run samples the same noise with the same weights and steps; the first 20% of the steps and layer 0 are
dense throughout. PSNR and SSIM are against the dense clip, the mean over the prompts and the worst; density
is measured. Seconds per step are medians over the steps behind the dense ones, compiled by Inductor.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from svg_ear_compile import quality, report, tiny_wan
from svg_ear_compile.cli import size_argument

PROMPTS = (
    "a plain blue disc moving right, over the flower photo panning up",
    "a striped red star moving left in front of a plain yellow square moving right, "
    "over the cat photo panning up",
)
DENSE_STEPS = 0.2
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, skipped blocks dropped": {"compensate": False},
    "svg_ear (the paper)": {"preset": "svg_ear"},
}


class Row(NamedTuple):
    """One run. psnr, ssim: one value a prompt."""

    name: str
    density: float
    psnr: list[float]
    ssim: list[float]
    step_seconds: float


def measure(
    steps: int = 30,
    size: tuple[int, int, int] = (16, 128, 128),
    density: float = 0.25,
    device: str = "cuda",
    inner: str = "inductor",
) -> list[Row]:
    """Samples all prompts densely and by every entry of RUNS."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sparse_from = round(DENSE_STEPS * steps)

    def sampled(name: str, backend: str, options: dict[str, Any] | None) -> tuple[list[Tensor], float]:
        torch._dynamo.reset()
        model = tiny_wan.load_model(device, dtype)
        model.compile_repeated_blocks(backend=backend, fullgraph=True, options=options)
        clips, seconds = [], []
        for number, prompt in enumerate(PROMPTS):
            noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(number)).to(device)
            ids = torch.tensor([tiny_wan.parse(prompt)], device=device)
            ends = [time.perf_counter()]
            with tqdm(total=steps, desc=f"{name}, prompt {number + 1}", disable=None) as bar:

                def on_step(_: int, ends: list[float] = ends, bar: tqdm[Any] = bar) -> None:
                    if device != "cpu":
                        torch.cuda.synchronize()
                    ends.append(time.perf_counter())
                    bar.update()

                clip = tiny_wan.sample(model, noise, ids, steps=steps, on_step=on_step)
            clips.append(clip[0].transpose(0, 1))
            seconds += [b - a for a, b in zip(ends[sparse_from + 1 :], ends[sparse_from + 2 :], strict=False)]
        return clips, statistics.median(seconds)

    dense, dense_step = sampled("dense", inner, None)
    rows = [Row("dense", 1.0, [math.inf] * len(dense), [1.0] * len(dense), dense_step)]
    shared = {"min_tokens": 1, "num_steps": steps, "dense_steps": DENSE_STEPS, "density": density}
    for name, options in RUNS.items():
        clips, step = sampled(name, "svg_ear", {**shared, "inner": inner, "strict": True, **options})
        rows.append(
            Row(
                name,
                report().totals()["measured_density"],
                [quality.psnr(a, b) for a, b in zip(dense, clips, strict=True)],
                [quality.ssim(a, b) for a, b in zip(dense, clips, strict=True)],
                step,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    headers = ("run", "density", "PSNR dB", "worst", "SSIM", "s / step")
    cells = [
        (r.name, r.density, statistics.mean(r.psnr), min(r.psnr), statistics.mean(r.ssim), r.step_seconds)
        for r in rows
    ]
    return tabulate(cells, headers, floatfmt=("", ".3f", ".2f", ".2f", ".4f", ".4f"))


def write(rows: list[Row], path: Path, settings: dict[str, Any]) -> None:
    """The rows with what they were measured on."""
    device = (
        torch.cuda.get_device_name()
        if settings["device"] == "cuda"
        else platform.processor() or platform.machine()
    )
    told = {
        "settings": settings,
        "hardware": device,
        "torch": torch.__version__,
        "rows": [{**r._asdict(), "psnr": [p if math.isfinite(p) else None for p in r.psnr]} for r in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=size_argument, default=(16, 128, 128))
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--json", type=Path)
    settings = vars(parser.parse_args())
    path = settings.pop("json")
    rows = measure(**settings)
    print(table(rows))
    if path is not None:
        write(rows, path, settings)


if __name__ == "__main__":
    main()
