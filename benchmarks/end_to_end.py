"""What does a user get at a published size? A pipeline of diffusers with plain Inductor, then with svg_ear.

    python benchmarks/end_to_end.py wan14b [--steps 10] [--density .15 | --quality high] [--json PATH]
    python benchmarks/end_to_end.py wan14b --width 832 --height 480 --frames 33 --density 1

The transformer has its published configuration and random weights, bfloat16 but for the modules that diffusers
keeps in fp32. Text comes as random embeddings, latents are what leaves. `compile_repeated_blocks` compiles, and
svg_ear is told nothing but the density or quality that is named here.

Plain Inductor runs the first steps of the schedule, the first of them to compile. svg_ear begins a generation
to compile, which is stopped, and then runs a whole one. Times lie between CUDA events at the ends of steps.
"difference": of the latents after a step that both ran, over how far plain Inductor has moved them by then;
rounding as long as all steps were dense, and with --density 1. Random weights say nothing about quality: they
attend nearly alike to all tokens, and the default may find that sparsity would not pay.

Checked, with exit status 1: latents are finite, svg_ear compiles no more often than plain Inductor, and no
step takes LONGEST times what is usual for its kind (dense: with plain Inductor; sparse: in the median).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from end_to_end_models import MODELS, TINY_SIZE, build
from tabulate import tabulate
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

import svg_ear_compile
from svg_ear_compile.presets import QUALITY

LONGEST = 1.5


@dataclass
class Run:
    """One generation, or its beginning. seconds: of each step; wall: of all of it, by the host's clock.

    compile_seconds, recompiles: of what Dynamo compiled meanwhile; peak: bytes, None on a CPU. early: the
    latents after each of the first steps.
    """

    seconds: list[float]
    wall: float
    compile_seconds: float
    recompiles: list[str]
    peak: int | None
    finite: bool
    early: list[Tensor]


class Clock:
    """Marks in time: CUDA events, which do not make the host wait, or the host's clock."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device != "cpu"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not self.is_cuda:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def seconds(self) -> list[float]:
        """Between marks that follow each other."""
        if not self.is_cuda:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]


def generate(pipe: Any, told: dict[str, Any], args: argparse.Namespace, steps: int | None = None) -> Run:
    """steps: it is stopped after so many; None: whole."""
    clock, early = Clock(args.device), []

    def end_of_step(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        clock.mark()
        if step < args.dense_steps_timed + 1:
            early.append(tensors["latents"].clone())
        if steps is not None and step + 1 == steps:
            pipe._interrupt = True
        return tensors

    clear_compilation_metrics()
    if clock.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    clock.mark()
    latents = pipe(**told, callback_on_step_end=end_of_step).frames
    seconds, metrics = clock.seconds(), get_compilation_metrics()
    return Run(
        seconds, time.perf_counter() - start, sum(m.entire_frame_compile_time_s or 0.0 for m in metrics),
        [m.recompile_reason for m in metrics if m.recompile_reason],
        torch.cuda.max_memory_allocated() if clock.is_cuda else None, bool(latents.isfinite().all()), early,
    )  # fmt: skip


def compile_blocks(pipe: Any, backend: str, options: dict[str, Any] | None) -> None:
    torch._dynamo.reset()
    gc.collect()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend, options=options)


def svg_ear_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("density", "quality")}
    told = {name: value for name, value in options.items() if value is not None}
    return {**told, "inner": "eager", "min_tokens": 1} if args.tiny else told


def steps_of(run: Run) -> list[dict[str, Any]]:
    """What svg_ear did in each step of the generation that the report shows last."""
    calls = svg_ear_compile.report().errors()
    rows = []
    for step, seconds in enumerate(run.seconds):
        own = [call for call in calls if call.step == step]
        sparse = [call for call in own if not call.dense]
        densities = [call.density for call in sparse if call.density is not None]
        errors = [call.error for call in sparse if call.error is not None]
        rows.append({
            "step": step + 1, "seconds": seconds, "sparse": len(sparse), "dense": len(own) - len(sparse),
            "density": statistics.mean(densities) if densities else None,
            "error": math.sqrt(statistics.mean(e**2 for e in errors)) if errors else None, "measured": len(errors),
            "why dense": ", ".join(f"{n} {why}" for why, n in Counter(c.dense for c in own if c.dense).items()),
        })  # fmt: skip
    return rows


def differences(run: Run, dense: Run, start: Tensor) -> list[float]:
    pairs = zip(run.early, dense.early, strict=True)
    return [((own - other).norm() / (other - start).norm()).item() for own, other in pairs]


def summary(dense: Run, warm_up: Run, run: Run, rows: list[dict[str, Any]], start: Tensor) -> dict[str, Any]:
    """Seconds of steps, what they cost more than usual, memory, compile times and what was checked."""
    dense_step = statistics.median(dense.seconds[1:])
    kinds: dict[str, list[float]] = {"dense": [], "sparse": [], "mixed": []}
    for row in rows:
        kinds["mixed" if row["sparse"] and row["dense"] else "sparse" if row["sparse"] else "dense"].append(
            row["seconds"]
        )
    medians = {kind: statistics.median(times) for kind, times in kinds.items() if times}
    usual = {**medians, "dense": dense_step}
    longest = {kind: max(times) / usual[kind] for kind, times in kinds.items() if times}
    recompiled = len(warm_up.recompiles + run.recompiles)
    return {
        "dense step, Inductor": dense_step,
        **{f"{kind} step, svg_ear": seconds for kind, seconds in medians.items()},
        "generation, Inductor (steps x median)": dense_step * len(rows),
        "generation, svg_ear": sum(run.seconds),
        "speedup of the generation": dense_step * len(rows) / sum(run.seconds),
        "speedup of a sparse step": dense_step / medians["sparse"] if "sparse" in medians else None,
        **{f"longest {kind} step / usual one": ratio for kind, ratio in longest.items()},
        "peak GB, Inductor": None if dense.peak is None else dense.peak / 1e9,
        "peak GB, svg_ear": None if run.peak is None else run.peak / 1e9,
        "peak ratio": run.peak / dense.peak if run.peak and dense.peak else None,
        "compile seconds, Inductor": dense.compile_seconds,
        "compile seconds, svg_ear": warm_up.compile_seconds,
        "first step with compiling, Inductor": dense.seconds[0],
        "first step with compiling, svg_ear": warm_up.seconds[0],
        "recompiles, Inductor": len(dense.recompiles),
        "recompiles, svg_ear": recompiled,
        "difference": differences(run, dense, start),
        "checks": {
            "latents are finite": dense.finite and run.finite,
            "no more compiles than Inductor": recompiled <= len(dense.recompiles) and not run.compile_seconds,
            f"no step of {LONGEST} times the usual": max(longest.values()) < LONGEST,
        },
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, help="default: as published; of HunyuanVideo its double blocks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--width", type=int, help="in pixels; default: as published, like --height and --frames"
    )
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--density", type=float)
    budget.add_argument("--quality", choices=QUALITY)
    parser.add_argument(
        "--dense-steps-timed", type=int, default=2, help="with plain Inductor, after the first"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="steps of svg_ear before the whole generation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy model and clip, and nothing goes to Inductor"
    )
    parser.add_argument("--json", type=Path, help="writes figures, hardware and versions there")
    args = parser.parse_args(argv)
    size = TINY_SIZE if args.tiny else MODELS[args.model].size
    for name, default in zip(("width", "height", "frames"), size, strict=True):
        setattr(args, name, getattr(args, name) or default)
    return args


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    print(
        f"\n{args.model}, {args.width} x {args.height} x {args.frames}, {args.steps} steps, {results['device']}"
    )
    print(svg_ear_compile.report(), "\n")
    print(f"Calls above count {args.warm_up} steps to warm up; those of the whole generation:")
    print(tabulate(results["steps"], headers="keys", floatfmt=".4g"), "\n")
    lines = {**results["summary"], **results["summary"]["checks"]}
    del lines["checks"]
    for reason in results["svg_ear"]["recompiles"] + results["warm-up"]["recompiles"]:
        print("recompiled:", reason)
    print(tabulate([(name, _short(value)) for name, value in lines.items() if value is not None]))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = arguments(argv)
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    results: dict[str, Any] = {"arguments": vars(args), "device": device, "torch": torch.__version__}

    def keep(name: str, value: Any) -> None:
        """After each part: what was measured outlives a time limit."""
        if isinstance(value, Run):
            value = {key: x for key, x in vars(value).items() if key != "early"}
            print(f"{name}: " + ", ".join(f"{x:.2f}" for x in value["seconds"]) + " s", flush=True)
        results[name] = value
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1, default=str) + "\n")

    pipe, told = build(args)
    compile_blocks(pipe, "eager" if args.tiny else "inductor", None)
    dense = generate(pipe, told, args, args.dense_steps_timed + 1)
    keep("inductor", dense)
    compile_blocks(pipe, "svg_ear", svg_ear_options(args))
    warm_up = generate(pipe, told, args, args.warm_up)
    keep("warm-up", warm_up)
    run = generate(pipe, told, args)
    keep("svg_ear", run)
    keep("steps", steps_of(run))
    keep("report", json.loads(svg_ear_compile.report().to_json()))
    keep("summary", summary(dense, warm_up, run, results["steps"], told["latents"]))
    show(results, args)
    return 0 if all(results["summary"]["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
