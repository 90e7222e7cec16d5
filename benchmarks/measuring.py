"""What do measured errors and the choice of forms cost, at real video sizes? One command, one table.

    python benchmarks/measuring.py [--shapes wan,hunyuan,cogvideox --density .25 --json PATH]

Medians of CUDA events around one call, all kinds of calls in turns: a GPU that gets warm gets slower. "measured":
with the error on a sample of each head's rows. "choosing": with a trial of all orders, with and without first-order
terms, of two densities in a dense call or one in a sparse call; a layer makes one of them in a generation, and
"choosing ms" is what the dense one adds. "of a generation": what all of that adds to the attention time of STEPS
steps with two calls for guidance, by the calls that the controller asks for in a model of LAYERS layers, whose
errors meet the target at DENSITY and fall as exp(-RATE density). "choosing", "measuring": its two parts. "longest
step": over one in which nothing is measured. "error" and "tried": what the measured call and the trial of the very
form say of one error, from different rows: they should agree to some 10%. `quality_plot.py` adds what choosing
costs to the times of attention.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import milliseconds
from tqdm import tqdm
from video_shapes import SHAPES, Inputs, Shape, make_inputs, padding_mask

from svg_ear_compile.kernels import context, ops  # noqa: F401 - registers the ops
from svg_ear_compile.runtime.density import TRIAL, CallLog, Controller, Decision
from svg_ear_compile.runtime.head_variants import ORDERS
from svg_ear_compile.runtime.layers import Layer
from svg_ear_compile.runtime.readback import Sums
from svg_ear_compile.settings import Settings

STEPS, LAYERS, BRANCHES, WARM_UP = 50, 40, 2, 2
DENSITY, RATE = 0.25, 5.0
PLAIN_DENSE, CHOOSING_DENSE, PLAIN, MEASURED, CHOOSING = KINDS = (
    "dense ms", "choosing, dense ms", "sparse ms", "measured ms", "choosing, sparse ms",
)  # fmt: skip


def calls_of_a_generation() -> list[Counter[str]]:
    """Of each step: how many calls of each of KINDS the controller asks for."""
    told = Settings()
    dense = round(told.dense_steps * STEPS) if isinstance(told.dense_steps, float) else told.dense_steps
    controller, layers = Controller(told, can_split=True), [Layer(number) for number in range(LAYERS)]
    steps = []
    for step in range(STEPS):
        controller.begin(step, dense, STEPS)
        steps.append(Counter[str]())
        for branch in range(BRANCHES):
            for layer in layers:
                decision = controller.decide(layer, branch)
                steps[-1][_kind(decision)] += 1
                log = CallLog(
                    0, 0, layer.number, branch, step, decision, _sums(decision, told.target_error or 0.0)
                )
                controller.ran(layer, log)
    return steps


def _sums(decision: Decision, target: float) -> Sums | None:
    """What the ops would have measured in a call."""
    if decision.measure is None:
        return None
    _, densities, orders, terms = decision.measure
    own = [] if decision.density is None else [decision.density]
    tried = [d for _ in orders or ("",) for d in densities for _ in range(1 + terms)]
    errors = [target * math.exp(RATE * (DENSITY - d)) for d in own + tried]
    return Sums(torch.tensor([[error**2, 1.0] for error in errors])[..., None, None])


def _kind(decision: Decision) -> str:
    measure = decision.measure
    if decision.dense:
        return PLAIN_DENSE if measure is None else CHOOSING_DENSE
    return PLAIN if measure is None else CHOOSING if measure.densities else MEASURED


def of_a_generation(times: dict[str, float], steps: Sequence[Counter[str]]) -> dict[str, float]:
    """What choosing and measuring add, as shares of the attention time without them."""
    plain = {CHOOSING_DENSE: PLAIN_DENSE, MEASURED: PLAIN, CHOOSING: PLAIN}

    def time(step: Counter[str], without: bool) -> float:
        return sum(count * times[plain.get(kind, kind) if without else kind] for kind, count in step.items())

    least = [time(step, without=True) for step in steps]
    measured = sum(step[MEASURED] for step in steps) * (times[MEASURED] - times[PLAIN]) / sum(least)
    added = sum(time(step, without=False) for step in steps) / sum(least) - 1
    longest = max(time(step, without=False) / plain for step, plain in zip(steps, least, strict=True))
    return {
        "of a generation": added, "choosing": added - measured, "measuring": measured, "longest step": longest,
    }  # fmt: skip


def measure(shape: Shape, inputs: Inputs, density: float, repeats: int) -> dict[str, Any]:
    routing = Settings().routing
    made: dict[Any, Any] = {}
    constants = (
        None, shape.text, shape.text_first, list(shape.grid), "auto", routing, True, density, 0, 0,
    )  # fmt: skip
    mask = padding_mask(shape)
    measured: dict[str, torch.Tensor] = {}

    def time(i: int, name: str, request: context.Measure | None, dense: bool) -> float:
        decision = context.SiteDecision("to be timed" if dense else "", density, measure=request)
        memo = context.Memo(seen_keys={0: shape.length - shape.padded}, made=made)
        running = context.RunContext(context.Decisions({0: decision}, strict=True), memo=memo)

        def call(_: int) -> None:
            with context.active(running):
                torch.ops.svg_ear.attention(*inputs[i % len(inputs)], mask, *constants)

        found = milliseconds(call, 1)  # behind one of its kind: the clock depends on what ran before
        if request is not None:
            measured[name] = running.results.measured[0]
        return found

    kinds = {
        PLAIN_DENSE: (None, True),
        CHOOSING_DENSE: (context.Measure(1, TRIAL, ORDERS, True), True),
        PLAIN: (None, False),
        MEASURED: (context.Measure(1), False),
        CHOOSING: (context.Measure(1, (density,), ORDERS, True), False),
    }
    rounds = [[time(i, name, *kind) for name, kind in kinds.items()] for i in range(WARM_UP + repeats)]
    medians = map(statistics.median, zip(*rounds[WARM_UP:], strict=True))
    times = dict(zip(kinds, medians, strict=True))
    lost, whole = measured[CHOOSING][:2].sum((2, 3)).T
    errors = (lost / whole).sqrt()
    return {
        "shape": shape.name, "heads": shape.heads, "density": density, **times,
        "choosing ms": times[CHOOSING_DENSE] - times[PLAIN_DENSE],
        **of_a_generation(times, calls_of_a_generation()),
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
