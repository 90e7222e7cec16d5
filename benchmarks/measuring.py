"""What do measured errors and the choice of forms cost, at real video sizes? One command, one table.

    python benchmarks/measuring.py [--shapes wan,hunyuan,cogvideox --density .25 --json PATH]

Medians of CUDA events around one call, all kinds of calls in turns: a GPU that gets warm gets slower.
"measured": with the error on 64 rows of each head. "choosing": with a trial as `control.py` asks for it, all
orders with and without first-order terms: of two densities in a dense call, of one in a sparse call; each
happens once in a generation, and "choosing ms" is what both add. "of a generation": what all of that adds to
the attention time of 50 steps, of which 10 are dense and the others sparse and measured as by default.
"error" and "tried": what the measured call and the trial of the very form say of one error, from different
rows: they should agree to some 10%. `quality_plot.py` adds what choosing costs to the times of attention.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import milliseconds
from tqdm import tqdm
from video_shapes import SHAPES, Inputs, Shape, make_inputs, padding_mask

from svg_ear_compile.control import AIM, TRIAL, Control
from svg_ear_compile.forms import ORDERS
from svg_ear_compile.kernels import context, ops  # noqa: F401 - registers the ops
from svg_ear_compile.settings import Settings

STEPS, DENSE_STEPS, WARM_UP = 50, 10, 2


def measured_calls() -> int:
    """How many sparse calls of a layer in a generation are measured, if its error is what is aimed at."""
    told = Settings(first_order=False)
    control, error = Control(told), AIM * (told.target_error or 0.0)
    for step in range(DENSE_STEPS, STEPS):
        decision = control.decide(step, num_steps=STEPS)
        sums = torch.tensor([error**2, 1.0]).view(1, 2, 1, 1)
        control.ran(step, decision, None if decision.measure is None else sums)
    return sum(step.sums is not None for step in control.steps)


def measure(shape: Shape, inputs: Inputs, density: float, repeats: int) -> dict[str, Any]:
    told, fixed = Settings(), {}
    constants = (
        None, shape.text, shape.text_first, list(shape.grid), "auto", told.routing, True, density, 0, 0,
    )  # fmt: skip
    mask = padding_mask(shape)
    measured: dict[str, torch.Tensor] = {}

    def time(i: int, name: str, request: context.Measure | None, dense: bool) -> float:
        running = context.Call(
            strict=True, measure={} if request is None else {0: request}, fixed=fixed,
            dense={0: "to be timed"} if dense else {},
        )  # fmt: skip
        running.seen_keys[0] = shape.length - shape.padded

        def call(_: int) -> None:
            with context.active(running):
                torch.ops.svg_ear.attention(*inputs[i % len(inputs)], mask, *constants)

        found = milliseconds(call, 1)  # behind one of its kind: the clock depends on what ran before
        if request is not None:
            measured[name] = running.measured[0]
        return found

    kinds = {
        "dense ms": (None, True),
        "choosing, dense ms": (context.Measure(1, TRIAL, ORDERS, True), True),
        "sparse ms": (None, False),
        "measured ms": (context.Measure(1), False),
        "choosing, sparse ms": (context.Measure(1, (density,), ORDERS, True), False),
    }
    rounds = [[time(i, name, *kind) for name, kind in kinds.items()] for i in range(WARM_UP + repeats)]
    medians = map(statistics.median, zip(*rounds[WARM_UP:], strict=True))
    times = dict(zip(kinds, medians, strict=True))
    dense, chosen, sparse, own, again = times.values()
    sparse_calls = STEPS - DENSE_STEPS
    more = chosen - dense + again - own + measured_calls() * (own - sparse)
    lost, whole = measured["choosing, sparse ms"][:2].sum((2, 3)).T
    errors = (lost / whole).sqrt()
    return {
        "shape": shape.name, "heads": shape.heads, "density": density, **times,
        "choosing ms": chosen - dense + again - own,
        "of a generation": more / (DENSE_STEPS * dense + sparse_calls * sparse),
        "error": errors[0].item(), "tried": errors[1].item(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="wan,hunyuan,cogvideox", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="writes the records, hardware and versions there")
    arguments = parser.parse_args(argv)
    records = []
    for shape in tqdm([SHAPES[name] for name in arguments.shapes.split(",")], desc="shapes", disable=None):
        inputs = [make_inputs(shape, seed) for seed in (0, 1)]
        records.append(measure(shape, inputs, arguments.density, arguments.repeats))
        del inputs
        torch.cuda.empty_cache()
    run = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": "bf16"}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    print(", ".join(run.values()))
    print(tabulate(records, headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
