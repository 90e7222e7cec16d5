"""The loss of flow matching, and how it is compared before and after a training.

    clip x0 in [-1, 1], noise e ~ N(0, 1), s in (0, 1)
    x_s = (1 - s) x0 + s e,   model(x_s, 1000 s, caption) ~ e - x0 (mean squared error)

In pixel space the layout of a scene is decided at s > 0.9. So s is logit-normal, moved up by
`tiny_wan.noise_shift` of the clip's size; one in four is uniform.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kinds import Kind
from scenes import Scenes
from torch import Tensor, nn

from svg_ear_compile.tiny_wan import NULL, noise_shift

Size = tuple[int, int, int]  # frames, height, width in pixels

VALIDATED_AT = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # noise levels s


def noise_levels(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """s of `count` clips: [count] in (0, 1); one in four uniform, the others logit-normal, moved up."""
    device, shift = generator.device, noise_shift(*size)
    normal = torch.randn(count, generator=generator, device=device).sigmoid()
    uniform = torch.rand(count, generator=generator, device=device)
    flat = torch.rand(count, generator=generator, device=device) < 0.25
    return torch.where(flat, uniform, shift * normal / (1 + (shift - 1) * normal))


def flow_matching_loss(
    kind: Kind, model: nn.Module, scenes: Scenes, size: Size, count: int, generator: torch.Generator,
    level: float | None = None, calm: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss of one batch drawn from `generator`; one caption in ten is replaced by the empty one.

    level: the noise level s of all clips, instead of `noise_levels`. calm: the share of calm clips.
    """
    device = scenes.device
    clip, ids = scenes.batch(count, *size, generator, anywhere=True, calm=calm)
    dropped = torch.rand(count, 1, generator=generator, device=device) < 0.1
    ids = torch.where(dropped, NULL, ids)
    noise = torch.randn(clip.shape, generator=generator, device=device)
    s = noise_levels(count, size, generator) if level is None else torch.full((count,), level, device=device)
    noisy = torch.lerp(clip, noise, s[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16):
        velocity = kind.velocity(model, noisy, s * 1000, ids)
    return F.mse_loss(velocity, noise - clip)


@torch.no_grad()
def validation_losses(
    kind: Kind, model: nn.Module, scenes: Scenes, size: Size, count: int, batches: int = 4, calm: float = 0.0
) -> dict[str, float]:
    """Mean loss over the same clips and noise at each noise level of VALIDATED_AT, and over the levels."""
    generator = torch.Generator(scenes.device)

    def loss(level: float, i: int) -> Tensor:
        generator.manual_seed(2**40 + i)
        return flow_matching_loss(kind, model, scenes, size, count, generator, level, calm)

    losses = {
        str(level): torch.stack([loss(level, i) for i in range(batches)]).mean() for level in VALIDATED_AT
    }
    losses["mean"] = torch.stack(list(losses.values())).mean()
    return {level: round(loss.item(), 5) for level, loss in losses.items()}
