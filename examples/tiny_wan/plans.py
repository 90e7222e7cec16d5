"""What is trained when: sizes of clips, their batches, which scenes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from losses import Size

from svg_ear_compile.tiny_wan import GUIDANCE

PEAK_LR = 1.5e-3
WARM_UP_STEPS = 100


@dataclass(frozen=True)
class Plan:
    """What to train when: each size's batch, and the sizes up to each share of the training.

    calm: the share of calm clips (`scenes.py`). muon: the optimizer of matrices (`train.py`).
    """

    batch: dict[Size, int]
    phases: tuple[tuple[float, dict[Size, float]], ...]  # (until this share, size: probability)
    sample_sizes: tuple[Size, ...]
    samplers: tuple[tuple[int, float], ...] = ((30, GUIDANCE),)  # steps and guidance of each sheet of samples
    calm: float = 0.0
    muon: bool = False

    def size_at(self, progress: float, step: int) -> Size:
        weights = next((w for until, w in self.phases if progress < until), self.phases[-1][1])
        return random.Random(step).choices(list(weights), list(weights.values()))[0]


IMAGE, SHORT, SMALL, LARGE = (1, 128, 128), (4, 128, 128), (16, 64, 64), (16, 128, 128)
BATCH = {IMAGE: 128, SHORT: 32, SMALL: 32, LARGE: 8}  # equally many tokens
TOY_SMALL, TOY_LARGE = (2, 16, 16), (4, 16, 16)
PLANS = {
    # From fresh weights: single frames and clips of 4 frames teach what things look like at the full resolution
    # for a fraction of the cost of 16 frames.
    "full": Plan(
        batch=BATCH,
        phases=(
            (0.3, {IMAGE: 0.6, SHORT: 0.2, SMALL: 0.2}),
            (0.6, {IMAGE: 0.2, SHORT: 0.4, SMALL: 0.4}),
            (1.0, {IMAGE: 0.1, SHORT: 0.3, SMALL: 0.2, LARGE: 0.4}),
        ),
        sample_sizes=(SMALL, LARGE),
    ),
    # From trained weights: shapes that keep their form, mostly at the size of the demo on a CPU.
    "calm": Plan(
        batch={SMALL: BATCH[SMALL], LARGE: BATCH[LARGE]},
        phases=((1.0, {SMALL: 0.87, LARGE: 0.13}),),
        sample_sizes=(SMALL, LARGE),
        samplers=((10, 1.0), (10, 2.0), (30, 2.0), (30, 3.0)),
        calm=0.88,
        muon=True,
    ),
    "toy": Plan(
        batch={TOY_SMALL: 2, TOY_LARGE: 2},
        phases=((0.5, {TOY_SMALL: 1}), (1.0, {TOY_LARGE: 1})),
        sample_sizes=(TOY_LARGE,),
        samplers=((2, 2.0),),
        calm=0.5,
        muon=True,
    ),
}


def learning_rate(progress: float, steps_since_fresh: int) -> float:
    """Linear warm-up, flat until 40% of the training, then a cosine down to 0."""
    warm = min(1.0, (steps_since_fresh + 1) / WARM_UP_STEPS)
    fall = min(1.0, max(0.0, (progress - 0.4) / 0.6))
    return PEAK_LR * warm * (1 + math.cos(math.pi * fall)) / 2
