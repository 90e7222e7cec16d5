"""How fast is one sparse attention call at real video sizes? One command, one table.

    python benchmarks/attention.py [--shapes all] [--densities .25,.15,.10] [--flex] [--json PATH]
    python benchmarks/attention.py --shapes wan --presets default,splits,svg_ear,svg2 --densities .3,.2,.15,.1

Timed from query, key, value as a model gives them ([B,L,H,D] permuted to [B,H,L,D]) to the output in the same
layout. Dense is the fastest of cuDNN and FlashAttention (and flex_attention with --flex) in the same run,
without a mask; where the model has one, dense with it is timed too, and ours gets it. Random data with
cluster structure (smooth low-rank fields over the frame grid, plus noise), rotating inputs, CUDA events,
medians. The stages are the kernel times of one profiled call; "limit" is density x dense time plus one read
of query, key and value, and "flex lists" flex_attention over the same block lists, which drops the skipped
blocks (video-only shapes, where its blocks and ours are the same). "extra GB" is the peak beyond query, key,
value and the output.

Presets: "default" with its cubes, "dropped" the same without compensation, "splits" and "kmeans" the same in
another order, "first_order" with first-order terms in every head (the default has them in those that gain),
and "svg_ear" and "svg2", the papers. k-means is timed as it is in all sparse steps but the
first: two iterations from the centroids before; splits as in a step that makes them anew. "clustering ms" are
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
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from timing import clustering_time, milliseconds, stage_times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm
from video_shapes import SHAPES, Inputs, Shape, make_inputs, padding_mask

from svg_ear_compile.kernels import context, ops  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK, Plan
from svg_ear_compile.settings import resolve

# The options that a preset of this table means. Orders are named: "auto" may differ from head to head.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"order": "cubes"},
    "dropped": {"order": "cubes", "compensate": False},
    "splits": {"order": "splits"},
    "kmeans": {"order": "kmeans"},
    "first_order": {"order": "cubes"},
    "svg_ear": {"preset": "svg_ear"},
    "svg2": {"preset": "svg2"},
}

PEAK_BYTES = 4.3e12  # bytes per second that an H200 reads from its memory, measured
# The joint softmax in float32 over the plan's own low-precision tensors: what is left is rounding.
CHECK_ROW, CHECK_ALL = 0.03, 0.008


def dense_times(inputs: Inputs, repeats: int, flex: bool) -> dict[str, float]:
    """Milliseconds of dense attention without a mask, by what computes it."""
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                found[backend.name.split("_")[0].lower()] = milliseconds(
                    lambda i: F.scaled_dot_product_attention(*inputs[i % len(inputs)]), repeats
                )
            except RuntimeError as error:  # not every one supports every shape
                print(f"{backend.name}: {error}")
    if flex:
        found["flex"] = milliseconds(lambda i: compiled_flex(*inputs[i % len(inputs)]), repeats)
    return found


def masked_dense_time(inputs: Inputs, mask: Tensor, repeats: int) -> float:
    """Milliseconds of dense attention with the model's bool mask, as torch picks it."""
    return milliseconds(
        lambda i: F.scaled_dot_product_attention(*inputs[i % len(inputs)], attn_mask=mask), repeats
    )


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def compiled_flex(*arguments: Any, **options: Any) -> Tensor:
    out: Tensor = _compiled_flex()(*arguments, **options)
    return out


def flex_time(query: Tensor, plan: Plan, repeats: int) -> float:
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

    return milliseconds(call, repeats)


def error_to_plan(
    out: Tensor, query: Tensor, plan: Plan, scale: float, heads: list[int], first_order: bool = False
) -> tuple[float, float]:
    """(worst row, all) relative error against the plan's joint softmax, 32 queries of each of these heads.

    first_order: with the terms of kernels/first_order.py, added up token by token.
    """
    difference = norm = worst = 0.0
    L, Ck = query.shape[2], plan.bias.shape[-1]
    random = torch.Generator(query.device).manual_seed(1)
    for head in heads:
        slots = torch.randint(L, (32,), device=query.device, generator=random)
        tokens = plan.query_order[0, head, slots].long()
        blocks = torch.searchsorted(plan.query_offsets[0, head].long(), slots, right=True) - 1
        listed = torch.arange(Ck, device=query.device) < plan.kept_count[0, head, blocks, None]
        kept = torch.zeros(32, Ck + 1, device=query.device, dtype=torch.bool)
        places = plan.kept_blocks[0, head, blocks].long().clamp(min=0).masked_fill(~listed, Ck)
        kept.scatter_(1, places, True)
        kept[:, Ck] = False  # also what masked keys, behind the last block, map to
        key_slots = torch.arange(L, device=query.device)
        owner = torch.searchsorted(plan.key_offsets[0, head].long(), key_slots, right=True) - 1
        q = query[0, head, tokens].float()
        logits = torch.cat(
            [
                (q @ plan.key[0, head].float().T * scale).masked_fill(~kept[:, owner], -math.inf),
                q @ plan.key_centroids[0, head].float().T * scale + plan.bias[0, head, blocks],
            ],
            1,
        )
        values = torch.cat([plan.value[0, head], plan.value_centroids[0, head]]).float()
        weights = logits.softmax(1)
        expected = weights @ values
        if first_order:
            skipped = weights[:, L:].sum(1, keepdim=True)
            expected += skipped * _linear(q, plan, scale, head, blocks, owner)
        error, size = (out[0, head, tokens].float() - expected).norm(dim=1), expected.norm(dim=1)
        worst = max(worst, (error / size).max().item())
        difference, norm = difference + error.square().sum().item(), norm + size.square().sum().item()
    return worst, math.sqrt(difference / norm)


def _linear(q: Tensor, plan: Plan, scale: float, head: int, blocks: Tensor, owner: Tensor) -> Tensor:
    """q_r^T M_i = scale sum_j p_ij / n_j sum_{t in j} q_r.(k_t - kc_j) (v_t - vc_j), i: the row's block."""
    centers, value_centers = (x[0, head].float() for x in (plan.key_centroids, plan.value_centroids))
    logits = plan.query_centroids[0, head, blocks].float() @ centers.T * scale + plan.bias[0, head, blocks]
    sizes = plan.key_offsets[0, head].diff().clamp(min=1)
    shares = logits.softmax(1).nan_to_num(0) / sizes  # NaN: nothing was skipped
    there = owner < len(sizes)
    owner = owner[there]
    keys = plan.key[0, head, there].float() - centers[owner]
    values = plan.value[0, head, there].float() - value_centers[owner]
    return scale * (shares[:, owner] * (q @ keys.T)) @ values


def error_to_dense(
    out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rows: int = 256
) -> float:
    """Relative error against dense attention on some queries of every head."""
    query, key, value = inputs
    sample = torch.linspace(0, query.shape[2] - 1, rows, device=query.device).long()
    dense = F.scaled_dot_product_attention(query[:, :, sample], key, value, attn_mask=mask).float()
    return ((out[:, :, sample].float() - dense).norm() / dense.norm()).item()


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
    first = context.Call(strict=True)
    with context.active(first):
        plan = Plan(*torch.ops.svg_ear.clustered_permute(*inputs[0], mask, *constants))
    totals = first.totals[0]
    terms = {0: (True,) * shape.heads} if preset == "first_order" else {}
    with context.active(context.Call(strict=True, first_order=terms)):
        out = torch.ops.svg_ear.attention(*inputs[0], mask, *constants)
    heads = sorted({0, shape.heads // 2, shape.heads - 1})
    worst, overall = error_to_plan(out, inputs[0][0], plan, scale, heads, bool(terms))
    lists = {"flex lists ms": flex_time(inputs[0][0], plan, repeats)} if flex and not shape.text else {}
    del plan

    # One context per input: what is carried from call to call (k-means centroids) belongs to one input.
    calls = [context.Call(strict=True, first_order=terms) for _ in inputs]

    def whole(i: int) -> None:
        if told.order == "splits":
            calls[i % len(inputs)].carried.clear()  # made anew: used again, they would cost nothing
        with context.active(calls[i % len(inputs)]):
            torch.ops.svg_ear.attention(*inputs[i % len(inputs)], mask, *constants)

    for i in range(len(inputs)):
        whole(i)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = milliseconds(whole, repeats)
    memory = torch.cuda.max_memory_allocated() - before - out.nbytes
    stages = stage_times(whole)
    without = total - clustering_time(whole, repeats)
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
