"""What the examples share: loading a published pipeline or, with --tiny, random tiny parts on a CPU."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

TESTS = Path(__file__).parents[1] / "tests"


@dataclass
class Run:
    """A pipeline to call. settings: what so small a model needs; none for a real one."""

    name: str
    pipe: Any
    device: torch.device
    tiny: dict[str, Any] | None
    settings: dict[str, Any]

    def call(self, **real: Any) -> dict[str, Any]:
        """Arguments for the pipeline: these, or the tiny ones."""
        return real if self.tiny is None else {**self.tiny, "num_inference_steps": 4}

    def accelerators(self, count: int) -> AbstractContextManager[Any]:
        """Inside, diffusers finds so many where the tiny pipeline runs: it counts accelerators, and a CPU has none."""
        if self.tiny is None:
            return nullcontext()
        return mock.patch.object(torch.accelerator, "device_count", return_value=count)

    def save(self, clip: Any, fps: int = 16) -> None:
        """Writes frames as a video; latents, as some tiny pipelines return, only say their shape."""
        if isinstance(clip, torch.Tensor):
            print("latents", tuple(clip.shape))
            return
        from diffusers.utils import export_to_video

        path = Path("outputs") / f"{self.name}.mp4"
        path.parent.mkdir(exist_ok=True)
        print("wrote", export_to_video(clip, str(path), fps=fps))


def is_tiny(doc: str | None) -> bool:
    """Whether --tiny was given; --help prints the example's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="random tiny parts on a CPU, for a look at what happens"
    )
    return bool(parser.parse_args().tiny)


def start(doc: str | None, tiny: str, repository: str, **loading: Any) -> Run:
    """The pipeline of a repository of the Hugging Face hub, on the GPU; or the tiny one of this name."""
    torch.set_grad_enabled(False)
    name = Path(sys.argv[0]).stem
    if is_tiny(doc):
        sys.path.insert(0, str(TESTS))
        from pipelines import tiny as parts
        from pipelines import tiny_others

        made = getattr(tiny_others, tiny)() if hasattr(tiny_others, tiny) else parts.build(tiny)
        return Run(name, made.pipe, torch.device("cpu"), made.arguments, {"min_tokens": 64, "inner": "eager"})
    from diffusers import DiffusionPipeline, ModularPipeline

    if "workflow" in loading:
        pipe = ModularPipeline.from_pretrained(repository, **loading)
        pipe.load_components(dtype=torch.bfloat16)
    else:
        pipe = DiffusionPipeline.from_pretrained(repository, torch_dtype=torch.bfloat16, **loading)
    return Run(name, pipe, torch.device("cuda"), None, {})
