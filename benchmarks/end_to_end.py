"""What does a user get at a published size? A pipeline of diffusers with plain Inductor, then with svg_ear.

    python benchmarks/end_to_end.py wan14b [--steps 10] [--density .15 | --quality high] [--json PATH]
    python benchmarks/end_to_end.py wan14b --width 832 --height 480 --frames 33 --density 1
    python benchmarks/end_to_end.py wan1b --with fp8 [--dense-steps-timed 10]

The transformer has its published configuration and random weights, bfloat16 but for the modules that diffusers
keeps in fp32. Text comes as random embeddings, latents are what leaves. Blocks are compiled one by one where
diffusers names them, and svg_ear is told nothing but the density or quality that is named here. --with: something
that users combine it with (end_to_end_stacks.py); plain Inductor runs with it, too.

Each begins a generation to compile, which is stopped. Then plain Inductor runs the first steps of one, svg_ear a
whole one. Times lie between CUDA events at the first call of the transformer and at the ends of steps: an image to
start from is encoded before. "difference": of the latents after a step that both ran, over how far plain Inductor has
moved them by then; rounding as long as all steps were dense, and with --density 1. "published steps": the published
number of them, the first tenth dense, calculated from the measured steps. Random weights say nothing about quality:
they attend nearly alike to all tokens, and the default may find that sparsity would not pay. Compile times are cold:
nothing comes from a cache, --warm measures them with caches.

Checked, with exit status 1: latents are finite, svg_ear compiles no more often than plain Inductor, and no
step takes LONGEST times what is usual for its kind (dense: with plain Inductor; sparse: in the median).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from end_to_end_models import MODELS, Watched, build, start_of
from end_to_end_stacks import STACKS
from end_to_end_summary import Run, show, steps_of, summary
from timing import groups
from torch import Tensor
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics
from torch.profiler import ProfilerActivity, profile

import svg_ear_compile
from svg_ear_compile.pipelines import repeated_blocks
from svg_ear_compile.presets import QUALITY


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


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Raised where a generation has run as many steps as it should."""


def generate(
    pipe: Any,
    told: dict[str, Any],
    args: argparse.Namespace,
    steps: int | None = None,
    profiled: bool = False,
) -> Run:
    """steps: it is stopped after so many; None: whole. profiled: the kernels of the last step are."""
    clock, early, compiled, finite = Clock(args.device), [], [], []
    profiler = profile(activities=[ProfilerActivity.CUDA])

    def at_end(step: int, latents: Tensor) -> None:
        clock.mark()
        compiled.append(len(get_compilation_metrics()))
        finite.append(latents.isfinite().all())
        if step < args.dense_steps_timed:
            early.append(latents.clone())
        if steps is not None and step + 1 == steps:
            raise Stopped
        if profiled and step + 2 == args.steps:
            torch.cuda.synchronize()
            profiler.start()

    def end_of_step(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        at_end(step, tensors["latents"])
        return tensors

    if isinstance(pipe.scheduler, Watched):
        pipe.scheduler.at_end = at_end
    else:
        told = {**told, "callback_on_step_end": end_of_step}

    clear_compilation_metrics()
    if clock.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()

    def at_first_call(*_: Any) -> None:
        clock.mark()
        hook.remove()

    hook = pipe.transformer.register_forward_pre_hook(at_first_call)
    with suppress(Stopped):
        pipe(**told)
    seconds, metrics = clock.seconds(), get_compilation_metrics()
    if profiled:
        profiler.stop()
    return Run(
        seconds, time.perf_counter() - start, sum(m.entire_frame_compile_time_s or 0.0 for m in metrics),
        [(bisect_right(compiled, i), m.recompile_reason) for i, m in enumerate(metrics) if m.recompile_reason],
        torch.cuda.max_memory_allocated() if clock.is_cuda else None, all(map(bool, finite)), early,
        groups(profiler.events()) if profiled else [],
    )  # fmt: skip


def compile_pipeline(pipe: Any, backend: str, options: dict[str, Any] | None, fullgraph: bool) -> None:
    """Its transformers block by block where their repeated blocks are known, else as a whole: as `enable` does it."""
    torch._dynamo.reset()
    gc.collect()
    for name in ("transformer", "transformer_2"):
        model = pipe.components.get(name)
        if model is not None:
            names = repeated_blocks(model)
            for part in [m for m in model.modules() if type(m).__name__ in names] or [model]:
                part.compile(fullgraph=fullgraph, backend=backend, options=options)


def svg_ear_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in ("density", "quality")}
    told = {name: value for name, value in options.items() if value is not None}
    return {**told, "inner": "eager", "min_tokens": 1} if args.tiny else told


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
        "--dense-steps-timed", type=int, default=2, help="with plain Inductor, after one to compile"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="steps of svg_ear before the whole generation")
    parser.add_argument("--with", dest="stack", default="", help=f"some of {', '.join(STACKS)}, by commas")
    parser.add_argument(
        "--profile", action="store_true", help="which kernels the last step takes its time for"
    )
    parser.add_argument("--warm", action="store_true", help="compile both again, now from caches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy model and clip, and nothing goes to Inductor"
    )
    parser.add_argument("--json", type=Path, help="writes figures, hardware and versions there")
    args = parser.parse_args(argv)
    model = MODELS[args.model]
    size = model.tiny_size if args.tiny else model.size
    for name, default in zip(("width", "height", "frames"), size, strict=True):
        setattr(args, name, getattr(args, name) or default)
    args.stack = [name for name in args.stack.split(",") if name]
    return args


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
    for name in args.stack:
        STACKS[name](pipe)
    inductor = ("eager" if args.tiny else "inductor", None)
    ours = ("svg_ear", svg_ear_options(args))

    def run(name: str, steps: int | None, profiled: bool = False) -> Run:
        runs[name] = generate(pipe, told, args, steps, profiled)
        keep(name, runs[name])
        return runs[name]

    runs: dict[str, Run] = {}
    fullgraph = not args.stack  # a cache decides between blocks whether they run
    with torch.compiler.config.patch(force_disable_caches=True):
        compile_pipeline(pipe, *inductor, fullgraph)
        run("inductor, compiling", 3 if "cache" in args.stack else 1)
        run("inductor", args.dense_steps_timed)
        compile_pipeline(pipe, *ours, fullgraph)
        run("svg_ear, compiling", args.warm_up)
        last = run("svg_ear", None, args.profile)
    keep("steps", steps_of(last))
    keep("report", json.loads(svg_ear_compile.report().to_json()))
    keep("summary", summary(runs, results["steps"], args, start_of(told, args)))
    show(results, args)
    if args.warm:
        for name, how in (("inductor", inductor), ("svg_ear", ours)):
            for cache in ("filling", "from"):
                compile_pipeline(pipe, *how, fullgraph)
                print(f"compiled in {run(f'{name}, {cache} caches', 1).compile_seconds:.1f} s")
    return 0 if all(results["summary"]["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
