"""How far is clip B from clip A? PSNR, SSIM and VMAF of each frame, both clips side by side, and their difference.

Clips are videos, GIFs or pictures that imageio reads, of the same size and number of frames.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Outcome, progress

if TYPE_CHECKING:
    from torch import Tensor

GAIN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="the reference, such as the dense clip")
    parser.add_argument("b", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/compare"), help="folder for what is written"
    )
    parser.add_argument("--fps", type=int, default=16, help="of the videos that are written")


def run(arguments: argparse.Namespace) -> Outcome:
    from .. import quality

    a, b = (read(path) for path in (arguments.a, arguments.b))
    if a.shape != b.shape:
        sizes = " and ".join("{} frames of {}x{}".format(*x.shape[:3]) for x in (a, b))
        raise ValueError(f"the clips have {sizes}: sample both with the same size, frames and seed")
    frames: dict[str, Any] = {"psnr": [], "ssim": []}
    for one, other in progress(list(zip(a.split(1), b.split(1), strict=True)), "frames"):
        psnr = quality.psnr(one, other)
        frames["psnr"].append(psnr if math.isfinite(psnr) else None)  # None: equal
        frames["ssim"].append(quality.ssim(one, other))
    without = ""
    try:
        frames["vmaf"] = quality.vmaf_frames(a, b)
    except (RuntimeError, ImportError) as error:
        without = f"no VMAF: {error}"
    whole = quality.psnr(a, b)
    clip = {"psnr": whole if math.isfinite(whole) else None}
    clip |= {name: statistics.mean(frames[name]) for name in ("ssim", "vmaf") if name in frames}
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = [arguments.out / name for name in ("side_by_side.mp4", "difference.mp4", "compare.json")]
    difference = ((a - b).abs() * GAIN).clamp(max=1)
    quality.write_side_by_side(
        files[0], {arguments.a.stem: a, arguments.b.stem: b}, fps=arguments.fps, scale=1
    )
    quality.write_side_by_side(files[1], {f"|difference| x {GAIN}": difference}, fps=arguments.fps, scale=1)
    data = {"a": str(arguments.a), "b": str(arguments.b), "clip": clip, "frames": frames, "note": without}
    files[2].write_text(json.dumps(data, indent=1) + "\n")
    return Outcome(data, _text(data, files))


def read(path: Path) -> Tensor:
    """[F, H, W, 3] in [0, 1]. Raises FileNotFoundError, or ValueError for what is no video."""
    import imageio.v3 as iio
    import torch

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        pixels = torch.from_numpy(iio.imread(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): pass mp4, gif or png") from error
    pixels = pixels[None] if pixels.dim() == 3 else pixels
    return pixels[..., :3].float() / 255


def _text(data: dict[str, Any], files: list[Path]) -> str:
    from tabulate import tabulate

    frames, clip = data["frames"], data["clip"]
    shown = {name: ["equal" if x is None else f"{x:.4g}" for x in values] for name, values in frames.items()}
    table = tabulate({"frame": range(len(frames["psnr"])), **shown}, headers="keys", disable_numparse=True)
    found = ", ".join(
        f"{name.upper()} {'equal' if x is None else format(x, '.4g')}" for name, x in clip.items()
    )
    lines = [
        table,
        f"the whole clip: {found} (PSNR in dB)",
        data["note"],
        "Open " + ", ".join(map(str, files)),
    ]
    return "\n".join(filter(None, lines))
