"""What do several GPUs bring? Wan 14B at 720p on one GPU and on all of them, plain Inductor and svg_ear.

    torchrun --nproc-per-node 2 benchmarks/several_gpus.py [--layers 8] [--density .15] [--json PATH]

The GPUs share the tokens by diffusers' Ulysses attention: `enable_parallelism` with
`ContextParallelConfig(ulysses_degree=P)`, then `compile_repeated_blocks`. Published configuration but for the number of
layers, random weights, bfloat16. A step here is one call of the transformer; guidance makes two of them.

- seconds: of a step, in the median; on several GPUs that of the slowest. On one GPU each runs for itself.
- collectives: milliseconds in NCCL's kernels in one step. The GPU that comes last to an exchange does not wait: the
  least of all GPUs, summed over the exchanges, is what they take. JSON also has each GPU's sum, waiting included.
- off: how far the output is from that of plain Inductor on one GPU, relative to it.

Checked, with exit status 1: outputs are finite; every self attention call is sparse; on several GPUs plain Inductor,
and svg_ear at density 1, differ from the model in eager mode on one GPU by no more than twice what plain Inductor does
there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from end_to_end_models import build_transformer
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import svg_ear_compile


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1280, help="in pixels, like --height and --frames")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=5, help="timed; one more compiles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model, and nothing goes to Inductor")
    parser.add_argument("--json", type=Path, help="writes figures, hardware and versions there")
    args = parser.parse_args(argv)
    args.model = "wan14b"
    return args


def make_inputs(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    random = torch.Generator(args.device).manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, device=args.device, generator=random).to(
            model.patch_embedding.weight.dtype
        )

    size = (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8
    text = noise(512, model.config.text_dim)
    return {"hidden_states": noise(16, *size), "encoder_hidden_states": text, "return_dict": False}


def spread(model: nn.Module, args: argparse.Namespace) -> None:
    """Over all ranks. diffusers counts accelerators, of which there are none on a CPU."""
    ranks = dist.get_world_size()
    config = ContextParallelConfig(ulysses_degree=ranks)
    if args.device == "cpu":
        with mock.patch.object(torch.accelerator, "device_count", return_value=ranks):
            model.enable_parallelism(config=config)
    else:
        model.enable_parallelism(config=config)


def slowest(seconds: list[float]) -> list[float]:
    """By step, what the slowest rank took."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    return [max(times) for times in zip(*everyone, strict=True)]


def synchronize(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def in_collectives(step: Callable[[], Any], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds in NCCL's kernels: of the exchanges alone, and by rank with waiting."""
    if args.device == "cpu":
        return {"collectives": None}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.name.startswith("ncclDevKernel")]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [kernel.device_time / 1e3 for kernel in kernels])
    return {
        "collectives": sum(map(min, zip(*everyone, strict=False))),
        "collectives by rank": [sum(times) for times in everyone],
        "number of collectives": [len(times) for times in everyone],
    }


def measure(
    model: nn.Module, inputs: dict[str, Any], how: dict[str, Any], steps: int, args: argparse.Namespace
) -> tuple[dict[str, Any], Tensor]:
    """(figures, the output of the first step). steps: timed ones; the first, which compiles, is not."""
    torch._dynamo.reset()
    gc.collect()
    if how:
        model.compile_repeated_blocks(**how)
    shared = model._parallel_config is not None

    def step(number: int) -> Tensor:
        timestep = torch.tensor([1000.0 - 20 * number], device=args.device)
        out: Tensor = model(**inputs, timestep=timestep)[0]
        return out

    seconds, first = [], None
    for number in range(steps + 1):
        dist.barrier()
        synchronize(args)
        start = time.perf_counter()
        out = step(number)
        synchronize(args)
        seconds.append(time.perf_counter() - start)
        first = out if first is None else first
    if shared:
        seconds = slowest(seconds)
    figures = {
        "GPUs": dist.get_world_size() if shared else 1,
        "seconds": statistics.median(seconds[1:]) if steps else None,
        "first step": seconds[0],
        "of each step": seconds[1:],
        "collectives": None,
        "finite": bool(first.isfinite().all()),
    }
    if shared and steps:
        figures |= in_collectives(lambda: step(steps + 1), args)
    report = svg_ear_compile.report()
    totals = report.totals()
    if report.sites:
        figures["report"] = str(report)
    return {**figures, **{key: totals[key] for key in ("sparse_calls", "dense_calls", "mean_density")}}, first


def off(out: Tensor, other: Tensor) -> float:
    return ((out.float() - other.float()).norm() / other.float().norm()).item()


def run(args: argparse.Namespace, keep: Callable[[str, dict[str, Any]], None]) -> dict[str, bool]:
    """Measures all variants; returns what was checked."""
    plain = {"backend": "eager" if args.tiny else "inductor"}
    tiny = {"inner": "eager", "min_tokens": 1} if args.tiny else {}

    def svg_ear(density: float) -> dict[str, Any]:
        return {
            "backend": "svg_ear",
            "options": {"density": density, "dense_steps": 0, "strict": True, **tiny},
        }

    sparse_calls, finite = [], []

    def variant(name: str, model: nn.Module, how: dict[str, Any], steps: int = args.steps) -> Tensor:
        figures, out = measure(model, inputs, how, steps, args)
        figures["off"] = off(out, dense) if dense is not None else 0.0
        finite.append(figures["finite"])
        if how.get("backend") == "svg_ear":
            calls = args.layers * (steps + 1 + (figures["collectives"] is not None))
            sparse_calls.append((figures["sparse_calls"], figures["dense_calls"]) == (calls, {}))
        keep(name, figures)
        return out

    dense: Tensor | None = None
    model = build_transformer(args)
    inputs = make_inputs(args, model)
    eager = measure(model, inputs, {}, 0, args)[1]
    dense = variant("Inductor, 1 GPU", model, plain)
    variant("svg_ear, 1 GPU", model, svg_ear(args.density))
    rounding = off(dense, eager)
    del model
    torch._dynamo.reset()
    gc.collect()

    model = build_transformer(args)
    spread(model, args)
    shared = variant(f"Inductor, {dist.get_world_size()} GPUs", model, plain)
    variant(f"svg_ear, {dist.get_world_size()} GPUs", model, svg_ear(args.density))
    exact = variant("svg_ear at density 1", model, svg_ear(1.0), steps=0)
    limit = 2 * max(rounding, 1e-6)
    return {
        "outputs are finite": all(finite),
        "every call is sparse": all(sparse_calls),
        f"Inductor on several GPUs is off by at most {limit:.2g}": off(shared, eager) <= limit,
        f"svg_ear at density 1 is off by at most {limit:.2g}": off(exact, eager) <= limit,
    }


def speedups(variants: dict[str, dict[str, Any]]) -> dict[str, float]:
    dense, sparse, dense_shared, sparse_shared = (
        figures["seconds"] for figures in list(variants.values())[:4]
    )
    return {
        "several GPUs over one, Inductor": dense / dense_shared,
        "several GPUs over one, svg_ear": sparse / sparse_shared,
        "svg_ear over Inductor, one GPU": dense / sparse,
        "svg_ear over Inductor, several GPUs": dense_shared / sparse_shared,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. Joins the process group that torchrun describes, if there is none yet."""
    args = arguments(argv)
    started_here = not dist.is_initialized()
    if args.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if started_here:
        own = None if args.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("gloo" if args.device == "cpu" else "nccl", device_id=own)
    is_first = dist.get_rank() == 0
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    variants: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {
        "arguments": vars(args), "device": device, "torch": torch.__version__, "GPUs": dist.get_world_size(),
        "variants": variants,
    }  # fmt: skip

    def keep(name: str, figures: dict[str, Any]) -> None:
        """After each variant: what was measured outlives a time limit."""
        variants[name] = figures
        if is_first:
            print(f"{name}: {figures['seconds']} s, first step {figures['first step']:.1f} s", flush=True)
            write()

    def write() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1, default=str) + "\n")

    with torch.no_grad():
        checks = run(args, keep)
    if is_first:
        results |= {"speedups": speedups(variants), "checks": checks}
        write()
        show(results, args)
    if started_here:
        dist.destroy_process_group()
    return 0 if all(checks.values()) else 1


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"\nWan 14B, {args.layers} layers, {args.width} x {args.height} x {args.frames}, {results['device']}"
    )
    columns = ("seconds", "first step", "collectives", "mean_density", "off")
    rows = [[name, *(figures[column] for column in columns)] for name, figures in results["variants"].items()]
    print(tabulate(rows, ["", *columns], floatfmt=".4g"), "\n")
    print(tabulate([*results["speedups"].items(), *results["checks"].items()], floatfmt=".4g"))
    print(list(results["variants"].values())[3]["report"])


if __name__ == "__main__":
    raise SystemExit(main())
