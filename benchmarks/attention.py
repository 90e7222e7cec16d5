"""How fast is one sparse attention call at real video sizes? One command, one table.

    python benchmarks/attention.py [--shapes wan,hunyuan,cogvideox] [--densities .25,.15,.10] [--json PATH]

Timed from query, key, value as a model gives them ([B,L,H,D] permuted to [B,H,L,D]) to the output in the same
layout. Dense is the faster of cuDNN and FlashAttention in the same run, without a mask. Random data with
cluster structure (smooth low-rank fields over the frame grid, plus noise), rotating inputs, CUDA events,
medians.

A speed-up is withheld ("check failed") where the output misses the joint softmax of the very plan that the
call used, on sampled queries ("to plan"). "error": relative difference from dense attention, also sampled.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.kernels import context, ops, triton_attention  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.plan import Plan


class Shape(NamedTuple):
    """Tokens of one attention call: a frame grid of video, and text."""

    name: str
    grid: tuple[int, int, int]
    text: int
    text_first: bool
    heads: int
    head_dim: int

    @property
    def length(self) -> int:
        return math.prod(self.grid) + self.text


SHAPES = {
    "wan": Shape("Wan 14B 720p", (21, 45, 80), 0, False, 40, 128),
    "wan480": Shape("Wan 14B 480p", (21, 30, 52), 0, False, 40, 128),
    "wan1.3b": Shape("Wan 1.3B 480p", (21, 30, 52), 0, False, 12, 128),
    "hunyuan": Shape("HunyuanVideo 720p", (33, 45, 80), 256, False, 24, 128),
    "hunyuan1.5": Shape("HunyuanVideo 1.5 720p", (31, 45, 80), 1985, False, 16, 128),
    "cogvideox": Shape("CogVideoX 5B", (13, 30, 45), 226, True, 48, 64),
    "ltx": Shape("LTX", (11, 24, 28), 0, False, 32, 64),
    "long": Shape("long video", (64, 64, 64), 0, False, 24, 128),
    "small": Shape("small, to try this file", (5, 20, 26), 40, False, 4, 128),
}
# The joint softmax in float32 over the plan's own low-precision tensors: what is left is rounding.
CHECK_ROW, CHECK_ALL = 0.03, 0.008


def make_inputs(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [1,H,L,D] bfloat16, strided as [1,L,H,D].

    Per head: 24 smooth random fields over the grid, at three scales, mixed into D channels by random matrices
    (query's and key's are alike, so that neighbours attend to each other), plus noise.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    H, L, D = shape.heads, shape.length, shape.head_dim
    out = torch.empty(3, 1, L, H, D, device="cuda", dtype=torch.bfloat16)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", generator=random)

    video = slice(shape.text, L) if shape.text_first else slice(0, L - shape.text)
    text = slice(0, shape.text) if shape.text_first else slice(L - shape.text, L)
    for head in range(H):
        parts = []
        for cells in (3, 6, 12):
            coarse = noise(1, 8, *(min(cells, n) for n in shape.grid))
            field = F.interpolate(coarse, size=shape.grid, mode="trilinear", align_corners=True)
            parts.append(field.flatten(2)[0].T)
        fields = torch.cat(parts, 1)
        fields = torch.cat([fields / fields.std(0), noise(shape.text, 24)])
        shared, own = noise(24, D), noise(3, 24, D)
        for i, amount in enumerate((0.3, 0.3, 1.0)):
            mixed = fields @ ((1 - amount) * shared + amount * own[i]) / 24**0.5
            mixed = 1.5 * mixed + 0.5 * noise(L, D) * (1 if i < 2 else 2)
            out[i, 0, video, head] = mixed[: L - shape.text].bfloat16()
            out[i, 0, text, head] = mixed[L - shape.text :].bfloat16()
    query, key, value = out.transpose(2, 3)
    return query, key, value


def milliseconds(call: Callable[[int], Any], repeats: int, warmup: int = 1) -> float:
    """Median of CUDA-event times; call gets the number of the run."""
    times = []
    for i in range(warmup + repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[warmup:])[repeats // 2]


def best_dense(inputs: list[tuple[Tensor, Tensor, Tensor]], repeats: int) -> tuple[float, str]:
    """(milliseconds, name) of the fastest dense attention."""
    found = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                time = milliseconds(
                    lambda i: F.scaled_dot_product_attention(*inputs[i % len(inputs)]), repeats
                )
                found.append((time, backend.name.split("_")[0].lower()))
            except RuntimeError:
                continue
    return min(found)


def error_to_plan(
    out: Tensor, query: Tensor, plan: Plan, scale: float, heads: list[int]
) -> tuple[float, float]:
    """(worst row, all) relative error against the plan's joint softmax, 32 queries of each of these heads."""
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
        expected = logits.softmax(1) @ values
        error, size = (out[0, head, tokens].float() - expected).norm(dim=1), expected.norm(dim=1)
        worst = max(worst, (error / size).max().item())
        difference, norm = difference + error.square().sum().item(), norm + size.square().sum().item()
    return worst, math.sqrt(difference / norm)


def error_to_dense(out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], rows: int = 256) -> float:
    """Relative error against dense attention on some queries of every head."""
    query, key, value = inputs
    sample = torch.linspace(0, query.shape[2] - 1, rows, device=query.device).long()
    dense = F.scaled_dot_product_attention(query[:, :, sample], key, value).float()
    return ((out[:, :, sample].float() - dense).norm() / dense.norm()).item()


def measure(
    shape: Shape, inputs: list[tuple[Tensor, Tensor, Tensor]], density: float, order: str, routing: str,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table, without what dense attention takes."""
    constants = (None, shape.text, shape.text_first, list(shape.grid), order, routing, True, density, 0, 0)
    scale = shape.head_dim**-0.5
    first = context.Call(strict=True)
    with context.active(first):
        plan = Plan(*torch.ops.svg_ear.clustered_permute(*inputs[0], None, *constants))
    totals = first.totals[0]
    with context.active(context.Call(strict=True)):
        out = torch.ops.svg_ear.attention(*inputs[0], None, *constants)
    heads = sorted({0, shape.heads // 2, shape.heads - 1})
    worst, overall = error_to_plan(out, inputs[0][0], plan, scale, heads)

    # One context per input: what is carried from call to call (k-means centroids) belongs to one input.
    calls = [context.Call(strict=True) for _ in inputs]

    def whole(i: int) -> None:
        with context.active(calls[i % len(inputs)]):
            torch.ops.svg_ear.attention(*inputs[i % len(inputs)], None, *constants)

    def permute(i: int) -> None:
        with context.active(calls[i % len(inputs)]):
            torch.ops.svg_ear.clustered_permute(*inputs[i % len(inputs)], None, *constants)

    def attend(_: int) -> None:
        triton_attention.attend(inputs[0][0], plan, scale, out, order == "kmeans")

    for i in range(len(inputs)):
        whole(i)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = milliseconds(whole, repeats)
    memory = torch.cuda.max_memory_allocated() - before
    permuting, attending = milliseconds(permute, repeats), milliseconds(attend, repeats)
    exact, executed = (x.item() / totals.pairs for x in (totals.exact, totals.executed))
    flops = 4 * shape.heads * shape.length**2 * shape.head_dim
    return {
        "shape": shape.name, "tokens": shape.length, "heads x d": f"{shape.heads} x {shape.head_dim}",
        "order": order, "density": density, "exact": exact, "executed": executed, "permute ms": permuting,
        "attend ms": attending, "total ms": total, "TFLOP/s": flops * executed / attending / 1e9,
        "error": error_to_dense(out, inputs[0]), "to plan": overall, "extra GB": memory / 1e9,
        "passed": worst <= CHECK_ROW and overall <= CHECK_ALL,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="wan,hunyuan,cogvideox", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--densities", default=".25,.15,.10")
    parser.add_argument("--orders", default="auto", help="of auto, cubes, splits, kmeans")
    parser.add_argument("--routing", default="output_error", help="output_error or svg_ear")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="writes the records, hardware and versions there")
    arguments = parser.parse_args()
    densities = [float(x) for x in arguments.densities.split(",")]
    records = []
    for name in arguments.shapes.split(","):
        shape = SHAPES[name]
        inputs = [make_inputs(shape, seed) for seed in (0, 1)]
        dense, by = best_dense(inputs, max(3, arguments.repeats // 2))
        for order, density in itertools.product(arguments.orders.split(","), densities):
            record = measure(shape, inputs, density, order, arguments.routing, arguments.repeats)
            speed = dense / record["total ms"] if record.pop("passed") else "check failed"
            records.append({**record, "dense ms": dense, "dense by": by, "speed-up": speed})
            print(f"{shape.name}, {order}, {density}: {speed}", flush=True)
        del inputs
        torch.cuda.empty_cache()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, routing {arguments.routing}, bf16, B=1"
    )
    print(tabulate(records, headers="keys", floatfmt=".4g"))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"run": _versions(vars(arguments)), "records": records}, indent=1)
        )


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
