"""PSNR and SSIM against values worked out by hand, and the pictures that the demo writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from svg_ear_compile.quality import (
    frames_last,
    psnr,
    ssim,
    vmaf,
    write_difference_strip,
    write_side_by_side,
)

pytest.importorskip("skimage")
iio = pytest.importorskip("imageio.v3")


def clip(value: float, frames: int = 4, height: int = 16, width: int = 20) -> torch.Tensor:
    return torch.full((frames, height, width, 3), value)


def test_psnr_of_constant_error() -> None:
    assert psnr(clip(0.5), clip(0.6)) == pytest.approx(20, abs=1e-4)  # error 0.1 -> mse 0.01 -> 20 dB
    assert psnr(clip(0.0), clip(1.0)) == 0
    assert psnr(clip(0.3), clip(0.3)) == math.inf


def test_psnr_is_over_the_whole_clip() -> None:
    other = clip(0.5)
    other[0] = 0.7  # one frame of four off by 0.2: mse = 0.04 / 4
    assert psnr(clip(0.5), other) == pytest.approx(20, abs=1e-4)


def test_ssim_of_constant_clips() -> None:
    # without variance only the luminance term is left: (2 ab + c1) / (a^2 + b^2 + c1)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(clip(0.2), clip(0.6)) == pytest.approx(expected, rel=1e-5)
    assert ssim(clip(0.2), clip(0.2)) == pytest.approx(1)


def test_ssim_of_an_inverted_pattern_is_negative() -> None:
    stripes = clip(0.0)
    stripes[:, :, ::2] = 1
    assert ssim(stripes, 1 - stripes) < -0.9


def moving(frames: int = 4) -> torch.Tensor:
    """Random squares that move to the right."""
    squares = torch.rand(1, 12, 16, 3, generator=torch.Generator().manual_seed(0))
    squares = squares.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.cat([squares.roll(2 * i, 2) for i in range(frames)])


def test_vmaf_falls_with_what_a_viewer_would_see() -> None:
    pytest.importorskip("imageio_ffmpeg")
    whole = moving()
    noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(whole.permute(0, 3, 1, 2), 9, 1, 4).permute(0, 2, 3, 1)
    faint, strong = ((whole + s * noise).clamp(0, 1) for s in (0.02, 0.2))
    scores = [vmaf(whole, x) for x in (whole, faint, strong)]
    assert scores[0] > 95
    assert scores == sorted(scores, reverse=True)
    assert scores[2] < 60
    assert vmaf(whole, blurred) < 60
    assert vmaf(blurred, whole) > vmaf(whole, blurred), "the reference comes first"


def test_vmaf_says_what_ffmpeg_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(ffmpeg, "get_ffmpeg_exe", lambda: "false")
    with pytest.raises(RuntimeError, match="libvmaf"):
        vmaf(moving(), moving())


def test_channels_first_and_last_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 16, 20, 3, generator=generator)
    first = [x.permute(0, 3, 1, 2) for x in (a, b)]
    assert psnr(*first) == psnr(a, b)
    assert ssim(*first) == ssim(a, b)
    assert torch.equal(frames_last(first[0]), a)


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 4, 3), torch.zeros(2, 5, 8, 8), clip(1.5), clip(-0.5), clip(math.nan)]
)
def test_what_is_no_clip_raises(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="clip"):
        psnr(bad, bad)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(clip(0.1), clip(0.1, frames=3))


@pytest.mark.parametrize("name", ["both.gif", "both.mp4"])
def test_side_by_side(tmp_path: Path, name: str) -> None:
    if name.endswith("mp4"):
        pytest.importorskip("imageio_ffmpeg")
    moving = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 16, 20, 3)
    write_side_by_side(tmp_path / name, {"dense": moving, "sparse": clip(0.5)}, scale=4)
    frames = iio.imread(tmp_path / name)
    assert frames.shape == (4, 14 + 64, 2 * 84, 3)
    assert frames[0, 40, 20].max() < 10
    assert frames[-1, 40, 20].min() > 245
    assert abs(int(frames[-1, 40, 100, 0]) - 128) < 10


def test_difference_strip(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    write_difference_strip(path, clip(0.5, frames=9), clip(0.6, frames=9), gain=4, columns=3, scale=1)
    picture = iio.imread(path)
    assert picture.shape == (3 * (14 + 16), 3 * 20, 3)
    levels = [int(picture[row * 30 + 14 + 8, 10, 0]) for row in range(3)]
    assert levels == [128, 153, 102]  # 0.5, 0.6, 0.1 x 4
