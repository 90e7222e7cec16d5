"""How fast is one sparse attention call at real video sizes? One command, one table.

    python benchmarks/attention.py [--shapes all] [--densities .25,.15,.10] [--flex] [--json PATH]
    python benchmarks/attention.py --shapes wan --presets default,splits,svg_ear,svg2 --densities .3,.2,.15,.1

Timed from query, key, value as a model gives them ([B,L,H,D] permuted to [B,H,L,D]) to the output in the same
layout. Dense is the fastest of cuDNN and FlashAttention (and flex_attention with --flex) in the same run,
without a mask; where the model has one, dense with it is timed too, and ours gets it. Random data with cluster
structure (smooth low-rank fields over the frame grid, plus noise), rotating inputs, CUDA events around IN_A_ROW
calls that follow each other as in a model (what the host takes to launch them counts where the GPU waits for
it), medians. The stages are the kernel times of one profiled call; "limit" is density x dense time plus one
read of query, key and value, and "flex lists" flex_attention over the same block lists, which drops the skipped
blocks (video-only shapes, where its blocks and ours are the same). "extra GB" is the peak beyond query, key,
value and the output.

Presets: "default" as a level runs, with first-order terms and splits in as many heads as choose them (FORMS);
"cubes" without either, "dropped" that without compensation, "splits" and "kmeans" that in another order,
"first_order" with first-order terms in every head, and "svg_ear" and "svg2", the papers. k-means is timed as it
is in all sparse steps but the first: two iterations from the centroids before; splits as in a step that makes
them anew, and with "default" as in one of RESPLIT steps. "clustering ms" are
the kernels that put tokens into blocks (k-means or splits; cubes are known beforehand), and "without
clustering ms" is the total less the time between events around them: what the call would take if clusters
were free.

A speed-up is withheld ("check failed") where the output misses the joint softmax of the very plan that the
call used, on sampled queries ("to plan"). "error": relative difference from dense attention, also sampled.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_checks import CHECK_ALL, CHECK_ROW, error_to_dense, error_to_plan
from tabulate import tabulate
from timing import clustering_time, milliseconds, stage_times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm
from video_shapes import SHAPES, Inputs, Shape, make_inputs, padding_mask

from svg_ear_compile.kernels import context, ops  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan
from svg_ear_compile.precedence import resolve
from svg_ear_compile.runtime.head_variants import RESPLIT

# The options that a preset of this table means. Orders are named: "auto" may differ from head to head.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cubes": {"order": "cubes"},
    "dropped": {"order": "cubes", "compensate": False},
    "splits": {"order": "splits"},
    "kmeans": {"order": "kmeans"},
    "first_order": {"order": "cubes"},
    "svg_ear": {"preset": "svg_ear"},
    "svg2": {"preset": "svg2"},
}

# The shares of heads in splits and with first-order terms; "default": in the levels' runs (results/levels_*.json).
FORMS = {"default": (0.35, 0.8), "first_order": (0.0, 1.0)}
IN_A_ROW = 4  # calls between two events
PEAK_BYTES = 4.3e12  # bytes per second that an H200 reads from its memory, measured


def dense_times(inputs: Inputs, repeats: int, flex: bool) -> dict[str, float]:
    """Milliseconds of dense attention without a mask, by what computes it."""
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                found[backend.name.split("_")[0].lower()] = milliseconds(
                    lambda i: F.scaled_dot_product_attention(*inputs[i % len(inputs)]),
                    repeats,
                    in_a_row=IN_A_ROW,
                )
            except RuntimeError as error:  # not every one supports every shape
                print(f"{backend.name}: {error}")
    if flex:
        found["flex"] = milliseconds(
            lambda i: compiled_flex(*inputs[i % len(inputs)]), repeats, in_a_row=IN_A_ROW
        )
    return found


def masked_dense_time(inputs: Inputs, mask: Tensor, repeats: int) -> float:
    """Milliseconds of dense attention with the model's bool mask, as torch picks it."""
    return milliseconds(
        lambda i: F.scaled_dot_product_attention(*inputs[i % len(inputs)], attn_mask=mask),
        repeats,
        in_a_row=IN_A_ROW,
    )


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def compiled_flex(*arguments: Any, **options: Any) -> Tensor:
    out: Tensor = _compiled_flex()(*arguments, **options)
    return out


def flex_time(query: Tensor, plan: SparsePlan, repeats: int) -> float:
    """Milliseconds of flex_attention over the plan's lists, with the queries in block order already."""
    L = query.shape[2]
    blocks = BlockMask.from_kv_blocks(
        torch.zeros_like(plan.kept_count), torch.zeros_like(plan.kept_blocks), plan.kept_count,
        plan.kept_blocks.clamp(min=0), BLOCK_SIZE=(QUERY_BLOCK, KEY_BLOCK), seq_lengths=(L, L),
        compute_q_blocks=False,
    )  # fmt: skip
    query = query.gather(2, plan.query_order.long()[..., None].expand_as(query))
    tiles = {"BLOCK_M": QUERY_BLOCK, "BLOCK_N": KEY_BLOCK}

    def call(_: int) -> None:
        with torch.no_grad():
            compiled_flex(query, plan.key, plan.value, block_mask=blocks, kernel_options=tiles)

    return milliseconds(call, repeats, in_a_row=IN_A_ROW)


def of_heads(share: float, heads: int) -> tuple[bool, ...]:
    """Which heads: this share of them, drawn at random, always the same; (): none."""
    chosen = random.Random(0).sample(range(heads), round(share * heads))
    return tuple(h in chosen for h in range(heads)) if chosen else ()


def measure(
    shape: Shape, inputs: Inputs, density: float, preset: str, repeats: int, flex: bool
) -> dict[str, Any]:
    """One row of the table, without what dense attention takes."""
    told = resolve({**PRESETS[preset], "density": density}, {}).settings
    constants = (
        None, shape.text, shape.text_first, list(shape.grid), told.order, told.routing, told.compensate,
        density, 0, 0,
    )  # fmt: skip
    scale, mask = shape.head_dim**-0.5, padding_mask(shape)
    splits, terms = (of_heads(share, shape.heads) for share in FORMS.get(preset, (0.0, 0.0)))
    decided = context.Decisions({0: context.SiteDecision("", density, splits, terms)}, strict=True)
    first = context.RunContext(decided)
    with context.active(first):
        plan = SparsePlan(*torch.ops.svg_ear.clustered_permute(*inputs[0], mask, *constants))
    totals = first.results.totals[0]
    with context.active(context.RunContext(decided)):
        out = torch.ops.svg_ear.attention(*inputs[0], mask, *constants)
    heads = sorted({0, shape.heads // 2, shape.heads - 1})
    worst, overall = error_to_plan(out, inputs[0][0], plan, scale, heads, terms)
    lists = {"flex lists ms": flex_time(inputs[0][0], plan, repeats)} if flex and not shape.text else {}
    del plan

    # One context per input: what is carried from call to call (k-means centroids) belongs to one input.
    calls = [context.RunContext(decided) for _ in inputs]
    anew = told.order == "splits"

    def whole(i: int) -> None:
        if anew:
            calls[i % len(inputs)].memo.carried.clear()  # made anew: used again, they would cost nothing
        with context.active(calls[i % len(inputs)]):
            torch.ops.svg_ear.attention(*inputs[i % len(inputs)], mask, *constants)

    for i in range(len(inputs)):
        whole(i)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = milliseconds(whole, repeats, in_a_row=IN_A_ROW)
    memory = torch.cuda.max_memory_allocated() - before - out.nbytes
    stages = stage_times(whole)
    without = total - clustering_time(whole, repeats)
    if any(splits):
        anew = True
        total += (milliseconds(whole, repeats, in_a_row=IN_A_ROW) - total) / RESPLIT
    exact, executed = (x / totals.pairs for x in totals.areas.tolist())
    flops = 4 * shape.heads * shape.length**2 * shape.head_dim
    return {
        "shape": shape.name, "tokens": shape.length, "heads x d": f"{shape.heads} x {shape.head_dim}",
        "preset": preset, "order": told.order, "density": density, "exact": exact, "executed": executed,
        **stages, "total ms": total, "without clustering ms": without, **lists,
        "TFLOP/s": flops * executed / stages["attend ms"] / 1e9,
        "error": error_to_dense(out, inputs[0], mask), "to plan": overall, "extra GB": memory / 1e9,
        "passed": worst <= CHECK_ROW and overall <= CHECK_ALL,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="all", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--densities", default=".25,.15,.10")
    parser.add_argument("--presets", default="default", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="flex_attention too, dense and over our lists")
    parser.add_argument("--json", type=Path, help="writes the records, hardware and versions there")
    arguments = parser.parse_args(argv)
    densities = [float(x) for x in arguments.densities.split(",")]
    records: list[dict[str, Any]] = []
    names = list(SHAPES) if arguments.shapes == "all" else arguments.shapes.split(",")
    for shape in tqdm([SHAPES[name] for name in names], desc="shapes", disable=None):
        inputs = [make_inputs(shape, seed) for seed in (0, 1)]
        few = max(3, arguments.repeats // 2)
        dense = dense_times(inputs, few, arguments.flex)
        by, best = min(dense.items(), key=lambda item: item[1])
        mask = padding_mask(shape)
        masked = None if mask is None else masked_dense_time(inputs, mask, few)
        read = 3 * shape.heads * shape.length * shape.head_dim * 2 / PEAK_BYTES * 1e3
        for preset, density in itertools.product(arguments.presets.split(","), densities):
            record = measure(shape, inputs, density, preset, arguments.repeats, arguments.flex)
            passed, total = record.pop("passed"), record["total ms"]
            records.append({
                **record, "dense ms": best, "dense by": by, "limit": best / (density * best + read),
                "speed-up": best / total if passed else "check failed",
                "all dense ms": dense, "masked dense ms": masked,
            })  # fmt: skip
            if arguments.json:  # after every row: a long run that is cut short has not been in vain
                _write(arguments.json, vars(arguments), records)
        del inputs
        torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, B=1")
    print(table(records))


def table(records: list[dict[str, Any]]) -> str:
    """The records, one row each, without what is the same in many."""
    hidden = {"all dense ms", "order", "executed", "without clustering ms"}
    rows = [{key: value for key, value in record.items() if key not in hidden} for record in records]
    return tabulate(rows, headers="keys", floatfmt=".4g")


def _write(path: Path, arguments: dict[str, Any], records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": _versions(arguments), "records": records}, indent=1) + "\n")


def _versions(arguments: dict[str, Any]) -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: str(value) for name, value in arguments.items()},
    }


if __name__ == "__main__":
    main()
