"""`svg-ear demo`: one clip, sampled densely and with svg_ear from the same noise, timed and compared.

Both runs use the same trained weights (`svg_ear_compile.tiny_wan`), regional compilation and the same Euler
steps; the only difference is the backend. Times leave out the first step of a run, which may compile, and the
steps that svg_ear runs dense on purpose.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import generation, quality, tiny_wan
from .settings import Settings

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

PROMPT = "a plain red square moving right, over the rocket photo panning left"
PAYS_BELOW = 0.85  # of a dense step's time; a sparse step that takes longer is not worth it
CPU_BUDGET = 150.0  # seconds for both clips; where they would take longer, a CPU does without guidance
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Demo:
    """What to sample. None: as the machine allows (CPU: 10 steps of 16x64x64, GPU: 30 of 16x128x128)."""

    steps: int | None = None
    size: Size | None = None  # frames, height, width in pixels
    density: float = 0.25
    seed: int = 0
    prompt: str = PROMPT
    guidance: float | None = None  # None: tiny_wan.GUIDANCE, or 1 (half the work) where time is short
    out: Path = Path("outputs/demo")
    device: str = "auto"
    compensation: bool = True
    backend: str = "svg_ear"
    weights: Path | None = None  # None: the packaged ones
    options: dict[str, Any] = field(default_factory=dict)  # further options of the backend


@dataclass(frozen=True)
class Result:
    """Clips [F, 3, H, W] in [0, 1], the seconds of each step, and how close the clips are to each other."""

    dense: Tensor
    sparse: Tensor
    dense_seconds: list[float]
    sparse_seconds: list[float]
    sparse_from: int  # the first step that svg_ear computes sparsely
    psnr: float
    ssim: float

    @property
    def dense_step(self) -> float:
        """Median seconds of a dense step, without the first."""
        return statistics.median(self.dense_seconds[1:])

    @property
    def sparse_step(self) -> float:
        """Median seconds of a sparse step."""
        return statistics.median(self.sparse_seconds[self.sparse_from :])


def can_compile(device: torch.device) -> bool:
    """Whether Inductor can build kernels: for a CPU it needs a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return compiler and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed_sample(
    model: WanTransformer3DModel, noise: Tensor, ids: Tensor, steps: int, guidance: float, name: str
) -> tuple[Tensor, list[float]]:
    """A clip [F, 3, H, W] in [0, 1] and the seconds of each step."""
    from tqdm import tqdm

    seconds: list[float] = []
    _synchronize(noise.device)
    last = time.perf_counter()
    with tqdm(total=steps, desc=name, unit="step", disable=None) as bar:

        def on_step(_: int) -> None:
            nonlocal last
            _synchronize(noise.device)
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            bar.update()

        with generation(num_steps=steps):  # this loop is no pipeline of diffusers, where it would be read
            clip = tiny_wan.sample(model, noise, ids, steps=steps, guidance=guidance, on_step=on_step)
    return clip[0].transpose(0, 1), seconds


@torch.no_grad()
def _forward_seconds(model: WanTransformer3DModel, noise: Tensor, ids: Tensor) -> float:
    """Seconds of one forward pass, after one that compiles."""
    for _ in range(2):
        _synchronize(noise.device)
        start = time.perf_counter()
        tiny_wan.sample(model, noise, ids, steps=1, guidance=1)
        _synchronize(noise.device)
    return time.perf_counter() - start


def run(demo: Demo) -> Result:
    """Samples both clips, prints what happened and writes side_by_side.gif, difference.png and demo.json."""
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if demo.device == "auto" else demo.device
    )
    on_cpu = device.type == "cpu"
    steps = demo.steps or (10 if on_cpu else 30)
    size = demo.size or ((16, 64, 64) if on_cpu else (16, 128, 128))
    if steps < 3:
        raise ValueError(f"at least 3 steps are needed to time a sparse one, got {steps}")
    sparse_from = max(1, math.floor(Settings.dense_steps * steps + 0.5))
    inner = "inductor" if can_compile(device) else "eager"
    if inner == "eager":
        print("There is no C++ compiler (or no Python headers) here: both runs do without Inductor.")

    dtype = torch.float32 if on_cpu else torch.bfloat16
    model = tiny_wan.load_model(device, dtype, demo.weights)
    patch = model.config.patch_size
    if any(pixels % p for pixels, p in zip(size, patch, strict=True)):
        raise ValueError(f"size {size} is not a multiple of the patch {tuple(patch)}")
    tokens = math.prod(pixels // p for pixels, p in zip(size, patch, strict=True))
    ids = torch.tensor([tiny_wan.parse(demo.prompt)], device=device)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(demo.seed)).to(device)
    print(tiny_wan.sentence(ids[0]))
    print(f"{'x'.join(map(str, size))} pixels, {tokens} tokens, {steps} steps, {device}")

    model.compile_repeated_blocks(backend=inner, fullgraph=True)
    forward = _forward_seconds(model, noise, ids)
    guidance = demo.guidance or (1.0 if on_cpu and 4 * steps * forward > CPU_BUDGET else tiny_wan.GUIDANCE)
    calls = 1 if guidance == 1 else 2
    estimate = 2 * steps * calls * forward
    print(
        f"A dense forward pass takes {forward:.3g} s, with {calls} per step; two dense runs take {estimate:.0f} s."
    )
    dense, dense_seconds = _timed_sample(model, noise, ids, steps, guidance, "dense  ")

    del model
    # By default clips as short as the CPU's 4,096 tokens stay dense: on a GPU they are not worth the trouble.
    options: dict[str, Any] = {"density": demo.density, "min_tokens": 1024}
    if on_cpu and "preset" not in demo.options:
        options["order"] = "cubes"  # beside first-order terms splits gain 0.1 dB, and making them takes time
    options |= {} if demo.compensation else {"compensate": False}
    options |= {"inner": "eager"} if inner == "eager" else {}
    options |= demo.options
    model = tiny_wan.load_model(device, dtype, demo.weights)
    model.compile_repeated_blocks(backend=demo.backend, fullgraph=True, options=options)
    sparse, sparse_seconds = _timed_sample(model, noise, ids, steps, guidance, "svg_ear")

    result = Result(
        dense, sparse, dense_seconds, sparse_seconds, sparse_from,
        psnr=quality.psnr(dense, sparse), ssim=quality.ssim(dense, sparse),
    )  # fmt: skip
    if demo.backend == "svg_ear":
        importlib.import_module("svg_ear_compile").report().print()
    _tell(result, demo)
    _write(
        result, demo, {"size": size, "steps": steps, "guidance": guidance, "device": str(device), **options}
    )
    return result


def _tell(result: Result, demo: Demo) -> None:
    from tabulate import tabulate

    rows = [
        ("dense", 1.0, result.dense_step, sum(result.dense_seconds), "", ""),
        (
            demo.backend,
            demo.density,
            result.sparse_step,
            sum(result.sparse_seconds),
            result.psnr,
            result.ssim,
        ),
    ]
    headers = ("run", "density", "s / step", "s total", "PSNR dB", "SSIM")
    print(tabulate(rows, headers, floatfmt=("", ".2f", ".3f", ".1f", ".2f", ".4f")))
    ratio = result.sparse_step / result.dense_step
    print(
        f"A sparse step takes {ratio:.2f}x of a dense one (medians; the first {result.sparse_from} of "
        f"{len(result.sparse_seconds)} steps are dense; first steps include compiling)."
    )
    if ratio > PAYS_BELOW:
        print(f"That is more than {PAYS_BELOW}x: at this size svg_ear does not pay on this machine.")


def _write(result: Result, demo: Demo, settings: dict[str, Any]) -> None:
    demo.out.mkdir(parents=True, exist_ok=True)
    files = [demo.out / name for name in ("side_by_side.gif", "difference.png", "demo.json")]
    scale = max(1, 256 // result.dense.shape[-1])
    quality.write_side_by_side(files[0], {"dense": result.dense, demo.backend: result.sparse}, scale=scale)
    quality.write_difference_strip(files[1], result.dense, result.sparse, scale=max(1, scale // 2))
    told = {
        "settings": {"prompt": demo.prompt, "seed": demo.seed, "backend": demo.backend, **settings},
        "dense_step_seconds": result.dense_step,
        "sparse_step_seconds": result.sparse_step,
        "dense_seconds": result.dense_seconds,
        "sparse_seconds": result.sparse_seconds,
        "psnr": result.psnr if math.isfinite(result.psnr) else None,  # None: equal clips
        "ssim": result.ssim,
    }
    files[2].write_text(json.dumps(told, indent=1))
    print("Open " + ", ".join(map(str, files)))
