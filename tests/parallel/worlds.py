"""Process groups for tests, and diffusers' models spread over their ranks.

A fake group has as many ranks as wanted in one process: its collectives answer with whatever lies in memory, which is
enough where only graphs are looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models.tiny import build
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

Figures = dict[str, Any]


def two_processes(folder: Path, device: str = "cpu", *runs: str) -> list[dict[str, Figures]]:
    """By rank, what two_ranks.py found. runs: names of some of its runs; none: all."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SVG_EAR")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder), device, *runs],
            env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, **degrees: Any) -> None:
    """model.enable_parallelism(...). diffusers counts accelerators, of which there are none on a CPU."""
    from diffusers import ContextParallelConfig

    plan = hunyuan_plan() if type(model).__name__.startswith("HunyuanVideo") else None
    with mock.patch.object(torch.accelerator, "device_count", return_value=dist.get_world_size()):
        model.enable_parallelism(config=ContextParallelConfig(**degrees), cp_plan=plan)


def hunyuan_plan() -> dict[str, Any]:
    """HunyuanVideo has none in diffusers. Each rank gets a share of the video and one of the text, so that the joint
    sequence of all ranks is [video 0, text 0, video 1, text 1, ...]; the mask of the model, [video, text], fits it as
    long as only text of the last rank is hidden."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    rope = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    return {
        "rope": {0: rope, 1: rope},
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def tiny(name: str, grid: tuple[int, int, int], text: int = 8) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model, and the arguments of a call whose text can be shared by the ranks."""
    model, arguments = build(name)
    torch.manual_seed(1)
    call = arguments(*grid) | {"return_dict": False}  # hooks of diffusers take tensors and tuples only
    if name == "minimax_h3":  # its packed sequence of 12 other rows, a keyframe and the clip
        return model, call
    call["encoder_hidden_states"] = torch.randn(1, text, 16)
    if name == "hunyuan_video":
        call["encoder_attention_mask"] = torch.arange(text)[None] < text - 2
    elif "encoder_attention_mask" in call:
        call["encoder_attention_mask"] = (
            None  # LTX's has as many heads as the model, a rank only a share of them
        )
    return model, call
