"""How far one clip is from another: PSNR, SSIM, VMAF, and pictures to look at.

A clip is a tensor [F, H, W, C] or [F, C, H, W] with C = 3 colour channels (or 1) and values in [0, 1].
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

LABEL_HEIGHT = 14  # pixels of the text line above a picture


def frames_last(clip: Tensor) -> Tensor:
    """The clip as [F, H, W, C] fp32 on the CPU. Raises ValueError for another shape, or values outside [0, 1]."""
    if clip.ndim != 4:
        raise ValueError(f"a clip is [F, H, W, C] or [F, C, H, W], got {tuple(clip.shape)}")
    if clip.shape[-1] not in (1, 3):
        if clip.shape[1] not in (1, 3):
            raise ValueError(f"a clip has 1 or 3 channels, first or last, got {tuple(clip.shape)}")
        clip = clip.permute(0, 2, 3, 1)
    clip = clip.detach().float().cpu()
    low, high = clip.aminmax()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(f"a clip's values lie in [0, 1], got {low.item()} to {high.item()}")
    return clip


def _pair(reference: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != clip.shape:
        raise ValueError(f"clips differ in shape: {tuple(reference.shape)} and {tuple(clip.shape)}")
    return frames_last(reference), frames_last(clip)


def psnr(reference: Tensor, clip: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over the whole clip: 10 log10(1 / mean((reference - clip)^2)).

    Infinite for equal clips.
    """
    a, b = _pair(reference, clip)
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(reference: Tensor, clip: Tensor) -> float:
    """Structural similarity, mean over frames: scikit-image's, 7 x 7 uniform window, data range 1.

    Per window and channel, in [-1, 1]: (2 m_a m_b + c1)(2 s_ab + c2) /
    ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2)) with means m, sample (co)variances s,
    c1 = 0.01^2, c2 = 0.03^2.
    """
    from skimage.metrics import structural_similarity

    a, b = _pair(reference, clip)
    values = [
        structural_similarity(x.numpy(), y.numpy(), data_range=1.0, channel_axis=-1)
        for x, y in zip(a, b, strict=True)
    ]
    return float(sum(values) / len(values))


def vmaf(reference: Tensor, clip: Tensor) -> float:
    """The mean of `vmaf_frames`."""
    return statistics.mean(vmaf_frames(reference, clip))


def vmaf_frames(reference: Tensor, clip: Tensor) -> list[float]:
    """Netflix's perceptual metric of each frame: 0 to 100, about 97 to 100 for equal clips.

    A regression of viewers' ratings (model vmaf_v0.6.1) on how well detail and motion are kept. Its weights come
    with ffmpeg, which comes with imageio-ffmpeg. It was fitted to people watching 1080p: at other sizes, scores
    only compare clips of the same size. Raises RuntimeError with ffmpeg's own message if ffmpeg cannot compute it.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    pair = _pair(reference, clip)
    _, height, width, channels = pair[0].shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    graph = "[0]format=yuv444p[a];[1]format=yuv444p[b];[b][a]libvmaf=log_fmt=json:log_path=vmaf.json"
    with tempfile.TemporaryDirectory() as folder:
        for name, x in zip(("reference", "clip"), pair, strict=True):
            pixels = (x.expand(-1, -1, -1, 3) if channels == 1 else x).mul(255).round().byte()
            Path(folder, name).write_bytes(pixels.contiguous().numpy().tobytes())
        command = [get_ffmpeg_exe(), "-v", "error", *raw, "-i", "reference", *raw, "-i", "clip"]
        ran = subprocess.run(
            [*command, "-lavfi", graph, "-f", "null", "-"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            raise RuntimeError(f"ffmpeg computes no VMAF (is it built with libvmaf?): {ran.stderr.strip()}")
        scores = json.loads(Path(folder, "vmaf.json").read_text())
    return [float(frame["metrics"]["vmaf"]) for frame in scores["frames"]]


def _picture(pixels: Tensor, label: str, scale: int) -> Image:
    """[H, W, C] in [0, 1] as a labelled RGB picture, enlarged `scale` times."""
    from PIL import Image, ImageDraw

    array = (pixels * 255).round().to(torch.uint8)
    array = array.expand(-1, -1, 3).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    height, width, _ = array.shape
    picture = Image.new("RGB", (width, height + LABEL_HEIGHT))
    picture.paste(Image.fromarray(array.contiguous().numpy()), (0, LABEL_HEIGHT))
    ImageDraw.Draw(picture).text((2, 1), label, fill=(255, 255, 255))
    return picture


def write_side_by_side(path: Path, clips: Mapping[str, Tensor], fps: int = 8, scale: int = 4) -> None:
    """Animates equally long clips side by side, each under its name; gif or mp4 by `path`'s ending."""
    import imageio.v3 as iio
    import numpy as np

    gap = int(len(clips) > 1)  # a black column between
    rows = [F.pad(frames_last(clip), (0, 0, 0, gap)) for clip in clips.values()]
    frames = []
    for pictures in zip(*rows, strict=True):
        labelled = [_picture(p, name, scale) for p, name in zip(pictures, clips, strict=True)]
        frames.append(np.concatenate([np.asarray(p) for p in labelled], 1))
    if path.suffix == ".gif":
        iio.imwrite(path, np.stack(frames), duration=1000 / fps, loop=0)
    else:
        iio.imwrite(path, np.stack(frames), fps=fps, macro_block_size=2)


def write_difference_strip(
    path: Path, dense: Tensor, sparse: Tensor, gain: float = 4.0, columns: int = 8, scale: int = 2
) -> None:
    """A png with rows dense, sparse, |difference| x gain and up to `columns` frames of the clip."""
    from PIL import Image

    a, b = _pair(dense, sparse)
    difference = ((a - b).abs() * gain).clamp(max=1)
    chosen = torch.linspace(0, len(a) - 1, min(columns, len(a))).round().long().tolist()
    rows = {"dense": a, "sparse": b, f"|difference| x {gain:g}": difference}
    pictures = [
        [_picture(clip[i], f"{name}, frame {i}" if i == chosen[0] else str(i), scale) for i in chosen]
        for name, clip in rows.items()
    ]
    width, height = pictures[0][0].size
    sheet = Image.new("RGB", (width * len(chosen), height * len(rows)))
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    sheet.save(path)
