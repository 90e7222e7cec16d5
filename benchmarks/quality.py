"""How close do sparse clips come to dense ones? Trained tiny models, several clips, one table.

    python benchmarks/quality.py [--steps 30 --size 16x128x128 --density .25,.15,.1 --clips 4 --json PATH]
    python benchmarks/quality.py --model hunyuan --weights outputs/tiny_hunyuan/export

The Wan model's weights ship with the package; `examples/tiny_wan/train.py --model hunyuan` (or cogvideox)
trains the others. Every run samples the same noise with the same weights and steps; the first 20% of the
steps and layer 0 are dense throughout. PSNR and SSIM are against the dense clip, the mean over the clips and
the worst; density is measured. Seconds per step (with guidance two model calls) are medians over the steps
behind the dense ones, each block compiled by Inductor. `quality_plot.py` draws what --json wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from svg_ear_compile import generation, quality, report, tiny_wan
from svg_ear_compile.cli import size_argument

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny_wan"))
from kinds import KINDS, Kind, compile_blocks

PROMPTS = (
    "a plain blue disc moving right, over the flower photo panning up",
    "a striped red star moving left in front of a plain yellow square moving right, "
    "over the cat photo panning up",
    "a plain red square moving right, over the rocket photo panning left",
    "a dotted white ring moving down, over the astronaut photo panning right",
    "a plain green triangle moving up-left, over the coffee photo panning down",
    "a striped purple cross moving down-right in front of a dotted blue disc moving up, "
    "over the temple photo panning left",
)
DENSE_STEPS = 0.2
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, skipped blocks dropped": {"compensate": False},
    "svg_ear (the paper)": {"preset": "svg_ear"},
}


class Row(NamedTuple):
    """One run. asked, density: the setting and what was measured; psnr, ssim: one value a clip."""

    model: str
    name: str
    asked: float
    density: float
    psnr: list[float]
    ssim: list[float]
    step_seconds: float


def timed_sample(
    kind: Kind, model: nn.Module, noise: Tensor, ids: Tensor, steps: int, guidance: float, label: str
) -> tuple[Tensor, list[float]]:
    """A clip [F, 3, H, W] in [0, 1] and the seconds of each step."""
    ends = [time.perf_counter()]
    with tqdm(total=steps, desc=label, disable=None) as bar:

        def on_step(_: int) -> None:
            if noise.device.type == "cuda":
                torch.cuda.synchronize(noise.device)
            ends.append(time.perf_counter())
            bar.update()

        # HunyuanVideo's blocks do not show the clock which two calls are one step
        with generation(num_steps=steps, branches=1 if guidance == 1 else 2):
            clip = tiny_wan.sample(
                model, noise, ids, steps=steps, guidance=guidance, on_step=on_step, velocity=kind.velocity
            )
    return clip[0].transpose(0, 1), [end - start for start, end in itertools.pairwise(ends)]


def measure(
    steps: int = 30,
    size: tuple[int, int, int] = (16, 128, 128),
    density: float | Sequence[float] = 0.25,
    device: str = "cuda",
    inner: str = "inductor",
    model: str = "wan",
    weights: Path | None = None,
    clips: int = 2,
    guidance: float = tiny_wan.GUIDANCE,
) -> list[Row]:
    """Samples `clips` clips densely and, at each density, by every entry of RUNS.

    Clip i has seed i and prompt i of PROMPTS, which start again after the last. weights: the export folder of
    a training; None: the packaged Wan.
    """
    kind = KINDS[model]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    first_timed = round(DENSE_STEPS * steps) + 1  # the first sparse step compiles
    if first_timed >= steps:
        raise ValueError(f"no sparse step to time in {steps} steps")
    if weights is None and model != "wan":
        raise ValueError(
            f"--weights: the folder of a trained {model} (examples/tiny_wan/train.py --model {model})"
        )

    def sampled(label: str, backend: str, options: dict[str, Any] | None) -> tuple[list[Tensor], float]:
        torch._dynamo.reset()
        network = kind.load(weights or Path(tiny_wan.__file__).parent, device, dtype)
        compile_blocks(network, backend=backend, fullgraph=True, options=options)
        sampled_clips, seconds = [], []
        for i in range(clips):
            noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(i)).to(device)
            ids = torch.tensor([tiny_wan.parse(PROMPTS[i % len(PROMPTS)])], device=device)
            clip, took = timed_sample(kind, network, noise, ids, steps, guidance, f"{label}, clip {i + 1}")
            sampled_clips.append(clip)
            seconds += took[first_timed:]
        return sampled_clips, statistics.median(seconds)

    dense, dense_step = sampled("dense", inner, None)
    rows = [Row(model, "dense", 1.0, 1.0, [math.inf] * clips, [1.0] * clips, dense_step)]
    for asked in (density,) if isinstance(density, float) else density:
        shared = {"min_tokens": 1, "num_steps": steps, "dense_steps": DENSE_STEPS, "density": asked}
        for name, options in RUNS.items():
            options = {**shared, "inner": inner, "strict": True, **options}
            sparse, step = sampled(f"{name} {asked:g}", "svg_ear", options)
            rows.append(
                Row(
                    model, name, asked, report().totals()["measured_density"],
                    [quality.psnr(a, b) for a, b in zip(dense, sparse, strict=True)],
                    [quality.ssim(a, b) for a, b in zip(dense, sparse, strict=True)],
                    step,
                )
            )  # fmt: skip
    return rows


def table(rows: Sequence[Row], style: str = "simple") -> str:
    headers = (
        "model", "run", "density", "measured", "PSNR dB", "worst", "SSIM", "s / step", "of dense",
    )  # fmt: skip
    dense = {row.model: row.step_seconds for row in rows if row.name == "dense"}
    cells = [
        (
            r.model, r.name, r.asked, r.density, statistics.mean(r.psnr), min(r.psnr),
            statistics.mean(r.ssim), r.step_seconds, r.step_seconds / dense[r.model],
        )
        for r in rows
    ]  # fmt: skip
    return tabulate(
        cells, headers, tablefmt=style, floatfmt=("", "", ".2f", ".3f", ".2f", ".2f", ".4f", ".4f", ".2f")
    )


def write(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> None:
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=size_argument, default=(16, 128, 128))
    parser.add_argument(
        "--density", type=lambda text: tuple(map(float, text.split(","))), default=(0.25, 0.15, 0.1)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--model", choices=KINDS, default="wan")
    parser.add_argument("--weights", type=Path, help="export folder of train.py; default: the packaged Wan")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=tiny_wan.GUIDANCE)
    parser.add_argument("--json", type=Path)
    settings = vars(parser.parse_args(argv))
    path = settings.pop("json")
    rows = measure(**settings)
    print(table(rows))
    if path is not None:
        write(rows, path, {name: value for name, value in settings.items() if name != "weights"})


if __name__ == "__main__":
    main()
