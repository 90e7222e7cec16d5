"""Procedural moving scenes with captions: the training data of the tiny Wan model.

`Scenes.batch` renders clips of one or two textured shapes that move, turn and grow, the first in front of the
second, over a slowly panning photograph. In a calm clip they only move: upright, at one size, near the middle,
mostly one plain shape. Everything is a batched tensor expression on one device, so a GPU renders faster than it
trains. The photographs ship inside the scikit-image and scikit-learn wheels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.tiny_wan import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MAX_OBJECTS,
    NONE,
    PANS,
    SHAPES,
    TEXTURES,
    slot_offset,
)

REFERENCE_FRAMES = 16  # speeds are "per 16 frames", so that clips of any length move alike
COLOUR_VALUES = (
    (0.90, 0.12, 0.12),
    (0.10, 0.72, 0.20),
    (0.15, 0.30, 0.95),
    (0.97, 0.85, 0.10),
    (0.62, 0.15, 0.80),
    (0.97, 0.97, 0.97),
)
CALM_ALONE = CALM_PLAIN = 0.8  # shares of the calm clips: one object; objects without a pattern
PAN_VECTORS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))


def _resize(photos: Tensor, size: int) -> Tensor:
    """[N, 3, H, W] -> [N, 3, size, size], anti-aliased."""
    return F.interpolate(photos, (size, size), mode="bilinear", antialias=True, align_corners=False)


def load_photos(size: int = 256) -> Tensor:
    """The photographs in the order of BACKGROUNDS: [6, 3, size, size] fp32 in [-1, 1], cut to squares."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    pictures = [
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        skimage.data.astronaut(),
    ]
    pictures += [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    photos = []
    for picture in pictures:
        photo = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        height, width = photo.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        photo = photo[..., top : top + side, left : left + side]
        photos.append(
            F.interpolate(photo, (size, size), mode="bilinear", antialias=True, align_corners=False)
        )
    return torch.cat(photos)


def shape_distances(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """About the signed distance to the outline of each clip's shape, negative inside.

    x, y: [B, F, H, W], the shape's own coordinates (it fits about the unit disc); shape: [B], an index into
    SHAPES. Returns [B, F, H, W].
    """
    radius, angle = torch.hypot(x, y), torch.atan2(x, -y)
    ax, ay = x.abs(), y.abs()
    distances = {
        "disc": radius - 0.85,
        "square": torch.maximum(ax, ay) - 0.75,
        "triangle": torch.maximum(0.866 * ax - 0.5 * y, y) - 0.5,
        "star": (radius - 0.68 - 0.26 * torch.cos(5 * angle)) * 0.7,
        "ring": (radius - 0.68).abs() - 0.24,
        "cross": torch.minimum(torch.maximum(ax - 0.95, ay - 0.3), torch.maximum(ax - 0.3, ay - 0.95)),
    }
    result = torch.zeros_like(x)
    for index, name in enumerate(SHAPES):
        result = torch.where((shape == index)[:, None, None, None], distances[name], result)
    return result


class Scenes:
    """Renders batches of scenes on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.photos = load_photos().to(self.device)
        self.colours = torch.tensor(COLOUR_VALUES, device=self.device) * 2 - 1
        angles = torch.arange(len(DIRECTIONS), device=self.device) * (math.pi / 4)
        self.directions = torch.stack([angles.cos(), angles.sin()], 1)  # y points down
        self.pans = torch.tensor(PAN_VECTORS, device=self.device)
        self._photos_at: dict[int, Tensor] = {}

    def batch(
        self, count: int, frames: int, height: int, width: int, generator: torch.Generator,
        anywhere: bool = False, calm: float = 0.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`count` clips [B, 3, F, H, W] fp32 in [-1, 1] and their captions [B, CAPTION_LENGTH] int64.

        `generator` must live on this object's device; the same seed gives the same clips. A clip of
        fewer than REFERENCE_FRAMES is the middle of a longer one, or, with `anywhere`, a random part of it.
        calm: the share of calm clips.
        """

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator, device=self.device)

        def choice(options: int) -> Tensor:
            return torch.randint(options, (count,), generator=generator, device=self.device)

        time = (torch.arange(frames, device=self.device) - (frames - 1) / 2).expand(count, -1)  # [B, F]
        if anywhere:
            room = max(0, REFERENCE_FRAMES - frames) / 2
            time = time + uniform(-room, room)[:, None]
        time = time / REFERENCE_FRAMES
        ys = (torch.arange(height, device=self.device) * 2 + 1) / height - 1
        xs = (torch.arange(width, device=self.device) * 2 + 1) / width - 1
        y, x = torch.meshgrid(ys, xs, indexing="ij")  # [H, W] in (-1, 1)

        background, pan = choice(len(BACKGROUNDS)), choice(len(PANS))
        zoom, travel = uniform(0.55, 0.65), uniform(0.25, 0.6)
        offset = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
        clip = self._panorama(background, self.pans[pan], zoom, travel, offset, time, x, y)

        caption = [background + slot_offset(0), pan + slot_offset(1)]
        alone = uniform(0, 1) < 0.25
        still = torch.zeros_like(alone)
        if calm:  # without, seeds give the clips that they always gave
            still = uniform(0, 1) < calm
            alone = torch.where(still, uniform(0, 1) < CALM_ALONE, alone)
        layers = []
        for k in range(MAX_OBJECTS):
            shape, colour = choice(len(SHAPES)), choice(len(COLOURS))
            texture, direction = choice(len(TEXTURES)), choice(len(DIRECTIONS))
            visible = ~alone if k else torch.ones_like(alone)
            size, growth = uniform(0.34, 0.52), uniform(-0.3, 0.3)
            angle, spin = uniform(0, 2 * math.pi), uniform(-2.5, 2.5)
            reach, speed = uniform(0, 0.4), uniform(0.7, 1.4)
            around = uniform(0, 2 * math.pi)
            if calm:
                growth, spin, angle = (x.masked_fill(still, 0) for x in (growth, spin, angle))
                texture = texture.masked_fill(still & (uniform(0, 1) < CALM_PLAIN), TEXTURES.index("plain"))
                size, reach = (
                    torch.where(still, 0.45 + (size - 0.34) / 2, size),
                    torch.where(still, reach / 2, reach),
                )
                speed = torch.where(still, 0.9 + (speed - 0.7) / 2, speed)
            middle = torch.stack([around.cos(), around.sin()], 1) * reach[:, None]  # where it is at time 0
            centre = (
                middle[:, None] + (speed[:, None] * self.directions[direction])[:, None] * time[..., None]
            )
            sizes = size[:, None] * (1 + growth[:, None] * time)
            angles = angle[:, None] + spin[:, None] * time
            layers.append(self._object(shape, colour, texture, visible, centre, sizes, angles, x, y))
            for word in (shape, colour, texture, direction):
                caption.append(torch.where(visible, word + slot_offset(len(caption)), NONE))
        for paint, alpha in reversed(layers):  # the first object is the nearest
            clip = torch.lerp(clip, paint, alpha)
        return clip.clamp(-1, 1), torch.stack(caption, 1)

    def _panorama(
        self, background: Tensor, pan: Tensor, zoom: Tensor, travel: Tensor, offset: Tensor, time: Tensor,
        x: Tensor, y: Tensor,
    ) -> Tensor:  # fmt: skip
        """Windows that slide over the photographs: [B, 3, F, H, W].

        background [B] photo; pan [B, 2] unit vector; zoom [B] half width of the window, travel [B] way of its
        centre in REFERENCE_FRAMES (photo coordinates in [-1, 1]); offset [B, 2] in [-1, 1] where it is at
        time 0; time [B, F].
        """
        count, frames = time.shape
        height, width = x.shape
        moving = pan.abs() * travel[:, None] / 2  # room that the motion takes, per axis
        centre = offset * (1 - zoom[:, None] - moving)
        centre = centre[:, None] + (pan * travel[:, None])[:, None] * time[..., None]  # [B, F, 2]
        grid = torch.stack([x, y], -1) * zoom[:, None, None, None]  # [B, H, W, 2]
        grid = (grid[:, None] + centre[:, :, None, None]).flatten(0, 1)  # [B * F, H, W, 2]
        photos = self._photos_for(max(height, width))[background]
        photos = photos[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
        out = F.grid_sample(photos, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return out.view(count, frames, 3, height, width).transpose(1, 2)

    def _photos_for(self, pixels: int) -> Tensor:
        """The photographs at the scale where one pixel of a window is about one pixel of the photograph."""
        size = min(self.photos.shape[-1], round(pixels / 0.6))
        if size not in self._photos_at:
            self._photos_at[size] = _resize(self.photos, size)
        return self._photos_at[size]

    def _object(
        self, shape: Tensor, colour: Tensor, texture: Tensor, visible: Tensor, centre: Tensor, size: Tensor,
        angle: Tensor, x: Tensor, y: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One object's paint [B, 3, F, H, W] and coverage [B, 1, F, H, W] in [0, 1], edges anti-aliased.

        shape, colour, texture, visible: [B]; centre [B, F, 2]; size (half extent) and angle [B, F].
        """
        dx = x - centre[..., 0, None, None]  # [B, F, H, W]
        dy = y - centre[..., 1, None, None]
        cos, sin = (f(angle)[..., None, None] / size[..., None, None] for f in (torch.cos, torch.sin))
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        pixels = size[..., None, None] * (x.shape[-1] / 2)  # pixels per unit of u and v
        distance = shape_distances(u, v, shape)
        cover = (0.5 - distance * pixels).clamp(0, 1)
        body = (0.5 - (distance + 0.12) * pixels).clamp(0, 1)  # inside the dark rim

        wave = 7.0
        striped = (0.5 + torch.sin(wave * u) * pixels / wave).clamp(0, 1)
        dotted = (0.5 + (torch.cos(wave * u) * torch.cos(wave * v) - 0.1) * pixels / wave).clamp(0, 1)
        index = texture[:, None, None, None]
        pattern = torch.where(index == TEXTURES.index("striped"), striped, torch.ones_like(striped))
        pattern = torch.where(index == TEXTURES.index("dotted"), 1 - dotted, pattern)
        shade = body * (0.3 + 0.7 * pattern)
        paint = (self.colours[colour][:, :, None, None, None] + 1) * shade[:, None] - 1
        return paint, (cover * visible[:, None, None, None])[:, None]
