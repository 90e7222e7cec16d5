"""What does a model draw? A sheet of sampled clips: one row a clip, frames side by side, its caption above."""

from __future__ import annotations

from pathlib import Path

import torch
from kinds import Kind
from losses import Size
from torch import nn

from svg_ear_compile.tiny_wan import parse, sample

PROMPTS = (
    "a plain red square moving right, over the rocket photo panning left",
    "a plain yellow star moving left, over the temple photo panning up",
    "a plain blue disc moving down, over the flower photo panning right",
    "a plain green triangle moving up-left, over the coffee photo panning down",
    "a plain white ring moving up, over the astronaut photo panning left",
    "a plain purple cross moving down-right, over the cat photo panning right",
    "a striped red star moving left in front of a plain yellow square moving right, over the cat photo panning up",
    "a dotted white ring moving down, over the astronaut photo panning right",
)
COLUMNS = 8


@torch.no_grad()
def write_samples(
    path: Path, kind: Kind, model: nn.Module, size: Size, samplers: tuple[tuple[int, float], ...]
) -> None:
    """All PROMPTS from one noise, by each of `samplers`: steps and guidance."""
    from PIL import Image, ImageDraw

    device = next(model.parameters()).device
    ids = torch.tensor([parse(prompt) for prompt in PROMPTS], device=device)
    noise = torch.randn(len(ids), 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    frames, height, width = size
    row = height + 14
    sheet = Image.new("RGB", (COLUMNS * width, len(samplers) * len(ids) * row))
    draw = ImageDraw.Draw(sheet)
    y = 0
    for steps, guidance in samplers:
        clips = sample(model, noise, ids, steps=steps, guidance=guidance, velocity=kind.velocity)
        for clip, prompt in zip((clips * 255).round().byte().cpu(), PROMPTS, strict=True):
            draw.text((2, y + 1), f"{steps} steps, guidance {guidance}: {prompt}", fill="white")
            for i in range(COLUMNS):
                frame = clip[:, round(i * (frames - 1) / (COLUMNS - 1))].permute(1, 2, 0)
                sheet.paste(Image.fromarray(frame.numpy()), (i * width, y + 14))
            y += row
    sheet.save(path)
