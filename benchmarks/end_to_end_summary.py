"""What do the steps of end_to_end.py's runs say? Medians, ratios, checks, and how they are printed."""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from end_to_end_models import MODELS
from tabulate import tabulate
from torch import Tensor

import svg_ear_compile

LONGEST = 1.5


@dataclass
class Run:
    """One generation, or its beginning. seconds: of each step; wall: of all of it, by the host's clock.

    compile_seconds: of what Dynamo compiled meanwhile; recompiles: step and reason of each. peak: bytes, None on
    a CPU. early: the latents after each of the first steps. kernels: of the last step, by group, if it was profiled.
    """

    seconds: list[float]
    wall: float
    compile_seconds: float
    recompiles: list[tuple[int, str]]
    peak: int | None
    finite: bool
    early: list[Tensor]
    kernels: list[dict[str, Any]]


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


def summary(
    runs: dict[str, Run], rows: list[dict[str, Any]], args: argparse.Namespace, start: Tensor
) -> dict[str, Any]:
    """Seconds of steps, what they cost more than usual, memory, compile times and what was checked."""
    first, dense, warm_up, run = runs.values()
    dense_step = statistics.median(dense.seconds)
    kinds: dict[str, list[float]] = {"dense": [], "sparse": [], "mixed": []}
    for row in rows[: -1 if run.kernels else None]:
        kinds["mixed" if row["sparse"] and row["dense"] else "sparse" if row["sparse"] else "dense"].append(
            row["seconds"]
        )
    medians = {kind: statistics.median(times) for kind, times in kinds.items() if times}
    usual = {**medians, "dense": dense_step}
    longest = {kind: max(times) / usual[kind] for kind, times in kinds.items() if times}
    whole = sum(dense.seconds) if len(dense.seconds) == len(rows) else dense_step * len(rows)
    in_both = max(len(first.seconds), len(dense.seconds))
    recompiled = [step for step, _ in warm_up.recompiles + run.recompiles]
    sparse = medians.get("sparse")
    published = MODELS[args.model].steps
    warm = math.ceil(published / 10)
    return {
        "dense step, Inductor": dense_step,
        **{f"{kind} step, svg_ear": seconds for kind, seconds in medians.items()},
        "generation, Inductor": whole,
        "generation, svg_ear": sum(run.seconds),
        "speedup of the generation": whole / sum(run.seconds),
        "speedup of a sparse step": dense_step / sparse if sparse else None,
        f"speedup of {published} published steps": published * dense_step
        / (warm * medians.get("dense", dense_step) + (published - warm) * sparse) if sparse else None,
        **{f"longest {kind} step / usual one": ratio for kind, ratio in longest.items()},
        "peak GB, Inductor": None if dense.peak is None else dense.peak / 1e9,
        "peak GB, svg_ear": None if run.peak is None else run.peak / 1e9,
        "peak ratio": run.peak / dense.peak if run.peak and dense.peak else None,
        "compile seconds, Inductor": first.compile_seconds,
        "compile seconds, svg_ear": warm_up.compile_seconds,
        "first step with compiling, Inductor": first.seconds[0],
        "first step with compiling, svg_ear": warm_up.seconds[0],
        "recompiles, Inductor": len(first.recompiles + dense.recompiles),
        "recompiles, svg_ear": len(recompiled),
        "difference": differences(run, dense, start),
        "checks": {
            "latents are finite": dense.finite and run.finite,
            "no more compiles than Inductor": sum(step < in_both for step in recompiled)
            <= len(first.recompiles + dense.recompiles) and run.compile_seconds <= dense.compile_seconds,
            f"no step of {LONGEST} times the usual": max(longest.values()) < LONGEST,
        },
    }  # fmt: skip


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    name = " + ".join([args.model, *args.stack])
    size = f"{args.width} x {args.height} x {args.frames}"
    print(f"\n{name}, {size}, {args.steps} steps, {results['device']}")
    print(svg_ear_compile.report(), "\n")
    print(f"Calls above count {args.warm_up} steps to compile; those of the whole generation:")
    print(tabulate(results["steps"], headers="keys", floatfmt=".4g"), "\n")
    lines = {**results["summary"], **results["summary"]["checks"]}
    del lines["checks"]
    if results["svg_ear"]["kernels"]:
        print(tabulate(results["svg_ear"]["kernels"], headers="keys", floatfmt=".4g"), "\n")
    for step, reason in results["svg_ear, compiling"]["recompiles"] + results["svg_ear"]["recompiles"]:
        print(f"recompiled in step {step + 1}:", reason)
    print(tabulate([(name, _short(value)) for name, value in lines.items() if value is not None]))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
