"""What is a block of HunyuanVideo worth at its real size? Its double- and its single-stream block, compiled.

    python benchmarks/hunyuan_block.py [--grid 33x45x80 --text 256] [--padded 192] [--json PATH]

diffusers' own blocks with random weights and inputs, bfloat16 on a GPU. Each gets the bool mask that the
model makes for a prompt; it hides the last --padded text tokens, by default none, and then "no mask" computes
the same. Variants take turns; times are medians on the host's clock, device synchronised. "error": of what
the block adds to its input, relative to plain Inductor with that mask. Random weights attend nearly alike to
all tokens, so at low density this error is no measure of a trained model's. A ratio is withheld where a dense
variant is further off than rounding, or a sparse one did not run sparse.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import svg_ear_compile
from svg_ear_compile.cli import size_argument

ROUNDING = {torch.bfloat16: 0.01, torch.float32: 1e-5}
MASKED, NO_MASK = "Inductor, its mask", "Inductor, no mask"


def make_block(kind: str, heads: int, head_dim: int) -> nn.Module:
    from diffusers.models.transformers import transformer_hunyuan_video as hunyuan

    torch.manual_seed(0)
    double = kind == "double"
    made = hunyuan.HunyuanVideoTransformerBlock if double else hunyuan.HunyuanVideoSingleTransformerBlock
    return made(heads, head_dim, mlp_ratio=4.0).eval()


def make_inputs(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, ...]:
    """(video tokens, text tokens, timestep embedding, mask, rotary tables)."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    width, length = args.heads * args.head_dim, math.prod(args.grid)
    random = torch.Generator(args.device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(1, *size, device=args.device, dtype=dtype, generator=random)

    eighth = args.head_dim // 8
    rotary = HunyuanVideoRotaryPosEmbed(1, 1, [2 * eighth, 3 * eighth, 3 * eighth])
    tables = rotary(torch.empty(1, 1, *args.grid, device=args.device))
    seen = length + args.text - args.padded
    mask = torch.arange(length + args.text, device=args.device) < seen
    return noise(length, width), noise(args.text, width), noise(width), mask[None, None, None], tables


def variants(densities: list[float]) -> dict[str, dict[str, Any]]:
    """Arguments of torch.compile, by name."""
    always = {"dense_layers": 0, "strict": True, "min_tokens": 1}
    ours = {"svg_ear, dense": {"dense_steps": 10**9}}
    ours |= {f"svg_ear, density {d:g}": {"dense_steps": 0, "density": d} for d in densities}
    plain = {"backend": "inductor"}
    return {MASKED: plain, NO_MASK: plain} | {
        name: {"backend": "svg_ear", "options": {**always, **options}} for name, options in ours.items()
    }


def measure(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant of a block."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    block = make_block(kind, args.heads, args.head_dim).to(args.device, dtype)
    video, text, temb, mask, tables = make_inputs(args, dtype)
    runs, seconds, added, sparse = {}, {}, {}, {}
    torch._dynamo.reset()
    for name, how in variants(args.densities).items():
        run = torch.compile(block, fullgraph=True, dynamic=False, **how)
        given = None if name == NO_MASK else mask
        runs[name] = functools.partial(run, video, text, temb, given, tables)

    def timed(name: str) -> float:
        start = time.perf_counter()
        out = runs[name]()
        if args.device != "cpu":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        added[name] = out[0] - video
        return taken

    with torch.no_grad():
        for name in runs:
            before = svg_ear_compile.report().totals()["sparse_calls"]
            timed(name)  # compiles
            sparse[name] = svg_ear_compile.report().totals()["sparse_calls"] > before
        for _ in range(args.rounds):
            for name in runs:
                seconds.setdefault(name, []).append(timed(name))
    rows: list[dict[str, Any]] = []
    best = statistics.median(seconds[NO_MASK])
    for name in runs:
        error = ((added[name] - added[MASKED]).float().norm() / added[MASKED].float().norm()).item()
        is_sparse, other_mask = "density" in name, name == NO_MASK and args.padded
        right = sparse[name] == is_sparse and (is_sparse or other_mask or error <= ROUNDING[dtype])
        median = statistics.median(seconds[name])
        rows.append({
            "block": kind, "variant": name, "ms": median * 1e3, "error": error,
            "no mask / this": best / median if right else "check failed",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=size_argument, default=(33, 45, 80), help="tokens")
    parser.add_argument("--text", type=int, default=256, help="tokens")
    parser.add_argument("--padded", type=int, default=0, help="so many of them are hidden")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--densities", default=".25,.15")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="writes the records, hardware and versions there")
    args = parser.parse_args()
    args.densities = [float(x) for x in args.densities.split(",")]
    records = []
    for kind in ("double", "single"):
        records += measure(kind, args)
        if args.json:
            device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
            about = {"device": device, "torch": torch.__version__, "arguments": vars(args)}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"run": about, "records": records}, indent=1, default=str) + "\n")
    print(f"{math.prod(args.grid)} video and {args.text} text tokens, {args.heads} x {args.head_dim}")
    print(tabulate(records, headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
