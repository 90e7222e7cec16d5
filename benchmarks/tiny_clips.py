"""How is a clip of a trained tiny model sampled, densely or sparsely?

By the model's own pipeline of diffusers (`tiny_pipelines.py`), and the backend is told nothing of it: what a
user gets. The Wan model's weights ship with the package; `examples/tiny_wan/train.py --model hunyuan` (or
cogvideox) trains the others. All runs of a model see the same noise, weights and steps; clip i has seed i and
prompt i of PROMPTS, which start again after the last.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import generate, pipeline
from torch import Tensor

from svg_ear_compile import tiny_wan
from svg_ear_compile.cli import size_argument

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny_wan"))
from kinds import KINDS, compile_blocks

PROMPTS = (
    "a plain blue disc moving right, over the flower photo panning up",
    "a striped red star moving left in front of a plain yellow square moving right, over the cat photo panning up",
    "a plain red square moving right, over the rocket photo panning left",
    "a dotted white ring moving down, over the astronaut photo panning right",
    "a plain green triangle moving up-left, over the coffee photo panning down",
    "a striped purple cross moving down-right in front of a dotted blue disc moving up, "
    "over the temple photo panning left",
)


@dataclass(frozen=True)
class Clips:
    """What is sampled. weights: the export folder of a training; None: the packaged Wan."""

    model: str = "wan"
    weights: Path | None = None
    steps: int = 30
    size: tuple[int, int, int] = (16, 128, 128)
    clips: int = 4
    guidance: float = tiny_wan.GUIDANCE
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    inner: str = "inductor"

    def __post_init__(self) -> None:
        if self.weights is None and self.model != "wan":
            raise ValueError(
                f"--weights: the folder of a trained {self.model} (examples/tiny_wan/train.py --model {self.model})"
            )

    def sampled(self, label: str, options: dict[str, Any] | None) -> Iterator[Tensor]:
        """Clips [F,3,H,W] in [0,1], each when it is asked for: report() then knows its generation.

        options: of the backend, on top of what all runs have; None: dense, compiled by the same compiler.
        """
        torch._dynamo.reset()
        kind = KINDS[self.model]
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        network = kind.load(self.weights or Path(tiny_wan.__file__).parent, self.device, dtype)
        if options is None:
            compile_blocks(network, backend=self.inner, fullgraph=True)
        else:
            shared = {"min_tokens": 1, "inner": self.inner, "strict": True}
            compile_blocks(network, backend="svg_ear", fullgraph=True, options={**shared, **options})
        pipe = pipeline(self.model, network, self.size)
        for i in range(self.clips):
            pipe.set_progress_bar_config(desc=f"{label}, clip {i + 1}", disable=None)
            noise = torch.randn(1, 3, *self.size, generator=torch.Generator().manual_seed(i)).to(self.device)
            ids = torch.tensor([tiny_wan.parse(PROMPTS[i % len(PROMPTS)])], device=self.device)
            yield generate(self.model, pipe, noise, ids, self.steps, self.guidance)[0].transpose(0, 1)

    def told(self) -> dict[str, Any]:
        """What a file of results says about how they came about."""
        on_gpu = self.device == "cuda"
        return {
            "settings": {name: value for name, value in asdict(self).items() if name != "weights"},
            "hardware": torch.cuda.get_device_name()
            if on_gpu
            else platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of Clips."""
    kinds = {"weights": Path, "size": size_argument, "steps": int, "clips": int, "guidance": float}
    helps = {"weights": "export folder of train.py; default: the packaged Wan", "size": "FxHxW in pixels"}
    for f in fields(Clips):
        choices = list(KINDS) if f.name == "model" else None
        parser.add_argument(
            f"--{f.name}", type=kinds.get(f.name, str), default=f.default, choices=choices,
            help=helps.get(f.name),
        )  # fmt: skip


def clips_of(arguments: argparse.Namespace) -> Clips:
    return Clips(**{f.name: getattr(arguments, f.name) for f in fields(Clips)})
