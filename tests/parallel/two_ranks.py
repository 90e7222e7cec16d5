"""One of two processes that run diffusers' models together: `python two_ranks.py RANK FOLDER DEVICE [RUN...]`.

Writes FOLDER/RANK.pt: by the name of a run, its figures (test_two_ranks.py and tests/gpu/test_two_gpus.py say what they
must be). All runs are in one process, since importing torch and diffusers takes longer than they do.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from models.plans import Kept, Truth, dropped, skips
from parallel.worlds import spread, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import EAGER

import svg_ear_compile
from svg_ear_compile.kernels import planning, reference
from svg_ear_compile.kernels.blocks.cubes import cubes
from svg_ear_compile.reporting import Report
from svg_ear_compile.reporting.ranks import own_path

DEVICE = sys.argv[3]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GRID = (3, 16, 16)
"""768 tokens, of which each rank has a frame and a half."""
DENSE = {**EAGER, "min_tokens": 1, "density": 1.0}
SPARSE = {**EAGER, "min_tokens": 1, "density": 0.3, "first_order": False}
Figures = dict[str, Any]


def compiled(model: nn.Module, way: str, **how: Any) -> Callable[..., Any]:
    if way == "whole":
        return torch.compile(model, **how)
    model.compile_repeated_blocks(fullgraph=way == "fullgraph", **how)
    return model


def placed(name: str, dtype: torch.dtype = DTYPE) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and the arguments of a call, where and as precise as they run."""
    model, call = tiny(name, GRID)
    for key, value in call.items():
        if isinstance(value, Tensor):
            call[key] = value.to(
                DEVICE, dtype if value.is_floating_point() and value.dim() > 1 else value.dtype
            )
    return model.to(DEVICE, dtype), call


def alone(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the model gives in one process."""
    model, call = placed(name, dtype)
    return model(**call)[0].float()


def rounding(name: str) -> float:
    return off(alone(name, DTYPE), alone(name))


def together(name: str, way: str, options: dict[str, Any]) -> tuple[Tensor, Report]:
    model, call = placed(name)
    spread(model, ulysses_degree=2)
    out = compiled(model, way, backend="svg_ear", options=options)(**call)[0]
    return out, svg_ear_compile.report()


def off(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def at_density_one(name: str, way: str) -> Figures:
    """How far the output is from that of one process, and what ran."""
    got, report = together(name, way, DENSE)
    totals = report.totals()
    calls = {key: totals[key] for key in ("sparse_calls", "dense_calls")}
    return {"off": off(got, alone(name)), "rounding": rounding(name)} | calls


def fully_sharded() -> Figures:
    """FSDP2: blocks are compiled first, since fully_shard gives their classes other names."""
    model, call = placed("wan")
    mesh = init_device_mesh(DEVICE, (2,))
    compiled(model, "fullgraph", backend="svg_ear", options=DENSE)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    got = model(**call)[0]
    calls = svg_ear_compile.report().totals()["sparse_calls"]
    return {"off": off(got, alone("wan")), "rounding": rounding("wan"), "sparse_calls": calls}


def at_density_03(name: str, way: str, patch: pytest.MonkeyPatch) -> Figures:
    """How far the output is from the joint softmax of the plans, and whether these are over the whole video."""
    kept = Kept(patch)
    got, report = together(name, way, SPARSE)
    grids = [graph.grid for graph in report.graphs]
    torch._dynamo.reset()
    model, call = placed(name)
    spread(model, ulysses_degree=2)
    truth = Truth(model, regional=False)
    truth.run = compiled(model, way, backend=truth.backend)
    order = cubes(GRID, torch.device(DEVICE))
    video = _video_places(kept[0].query_order.shape[-1], order)
    return {
        "off": off(got, truth(call, list(kept), reference.joint_softmax)),
        "rounding": rounding(name),
        "off_if_dropped": off(got, truth(call, list(kept), dropped)),
        "plans": len(kept),
        "heads": {plan.query_order.shape[1] for plan in kept},
        "skips": any(map(skips, kept)),
        "cubes": all(bool((plan.query_order[..., : len(order)] == video).all()) for plan in kept),
        "grids": grids,
        "text_exact": all(_text_is_exact(plan, len(order)) for plan in kept),
    }


def _video_places(length: int, cubes: Tensor) -> Tensor:
    """Where the video tokens lie, in the order of cubes: [video 0, text 0, video 1, text 1] for two ranks."""
    share, text = len(cubes) // 2, (length - len(cubes)) // 2
    return cubes + cubes // share * text


def _text_is_exact(plan: Any, num_video: int) -> bool:
    """Whether blocks with text are kept for all queries, and all blocks for queries of text."""
    kept = reference.kept_matrix(plan)
    keys, queries = (x[..., :-1] >= num_video for x in (plan.key_offsets, plan.query_offsets))
    filled = plan.key_offsets.diff(dim=-1) > 0
    pairs = (keys[..., None, :] | queries[..., :, None]) & filled[..., None, :]
    return bool((kept | ~pairs).all())


def when_one_rank_fails(patch: pytest.MonkeyPatch) -> Figures:
    """Rank 1 cannot make plans, and runs dense; rank 0 goes on sparse. Nobody waits for ever."""
    if dist.get_rank() == 1:
        patch.setattr(planning, "make_plan", lambda *_: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got, report = together("wan", "regional", {**SPARSE, "strict": False})
    return {"off": off(got, alone("wan")), "fallbacks": sum(report.totals()["fallbacks"].values())}


def when_one_rank_cannot_rewrite(patch: pytest.MonkeyPatch) -> Figures:
    """Rank 1 fails while its graphs are looked at, and compiles them as they are."""
    if dist.get_rank() == 1:
        patch.setattr("svg_ear_compile.backend.rewrite", lambda *_: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got, report = together("wan", "regional", {**SPARSE, "strict": False})
    return {"off": off(got, alone("wan")), "sparse_calls": report.totals()["sparse_calls"]}


def spread_over_ranks() -> Figures:
    """What rank 0 prints of all ranks, and where each would write a report."""
    _, report = together("wan", "regional", SPARSE)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        report.print_ranks()
    return {"said": said.getvalue(), "path": own_path("out/report.html")}


def main(rank: int, folder: Path, names: Sequence[str]) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    runs: dict[str, Callable[[pytest.MonkeyPatch], Figures]] = {
        "wan whole 1.0": lambda _: at_density_one("wan", "whole"),
        "hunyuan_video fullgraph 1.0": lambda _: at_density_one("hunyuan_video", "fullgraph"),
        "wan regional 0.3": lambda patch: at_density_03("wan", "regional", patch),
        "hunyuan_video fullgraph 0.3": lambda patch: at_density_03("hunyuan_video", "fullgraph", patch),
        "minimax_h3 regional 1.0": lambda _: at_density_one("minimax_h3", "regional"),
        "minimax_h3 whole 1.0": lambda _: at_density_one("minimax_h3", "whole"),
        "minimax_h3 regional 0.3": lambda patch: at_density_03("minimax_h3", "regional", patch),
        "wan FSDP2 1.0": lambda _: fully_sharded(),
        "one rank fails": when_one_rank_fails,
        "one rank cannot rewrite": when_one_rank_cannot_rewrite,
        "spread": lambda _: spread_over_ranks(),
    }
    found = {}
    for name, run in runs.items() if not names else [(name, runs[name]) for name in names]:
        began = time.monotonic()
        torch._dynamo.reset()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            found[name] = run(patch)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:])
