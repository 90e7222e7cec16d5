"""Every kernel once, on small odd shapes: what compute-sanitizer watches (make sanitize).

Without the caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING=1) each tensor has an allocation of its own, so
that a read behind its end is seen. The outputs are compared with the joint softmax of the plans: a watched
run that computes nothing would pass.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from svg_ear_compile.kernels import context, ops, reference  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.plan import Plan

TEXT, GRID = 19, (3, 7, 11)
CASES: tuple[tuple[str, str, int, torch.dtype], ...] = (
    ("cubes", "output_error", 128, torch.bfloat16),
    ("cubes", "output_error", 64, torch.float16),
    ("splits", "output_error", 96, torch.bfloat16),
    ("kmeans", "svg_ear", 128, torch.bfloat16),
)


def main() -> None:
    length = math.prod(GRID) + TEXT
    random = torch.Generator("cuda").manual_seed(0)
    for (order, routing, head_dim, dtype), masked in itertools.product(CASES, (False, True)):
        x = torch.randn(3, 2, length, 2, head_dim, device="cuda", generator=random).to(dtype)
        query, key, value = x.transpose(2, 3)
        mask = torch.ones(2, 1, 1, length, device="cuda", dtype=torch.bool)
        mask[1, ..., -7:] = False
        seen = mask if masked else None
        fixed: tuple[Any, ...] = (None, TEXT, False, list(GRID), order, routing, True, 0.3, 0, 0)
        with context.active(context.Call(strict=True)):
            out = torch.ops.svg_ear.attention(query, key, value, seen, *fixed)
            parts = torch.ops.svg_ear.clustered_permute(query, key, value, seen, *fixed)
            exact = torch.ops.svg_ear.sparse_exact(query, key, value, seen, *parts, *fixed)
            merged = torch.ops.svg_ear.centroid_compensation(query, *exact, *parts, *fixed)
        expected = reference.joint_softmax(query, Plan(*parts), head_dim**-0.5)
        for name, got in (("attention", out), ("three ops", merged)):
            error = ((got - expected).norm() / expected.norm()).item()
            print(f"{order} {routing} {head_dim} {dtype} mask {masked} {name}: error {error:.1e}", flush=True)
            if not error < 0.02:
                raise SystemExit("the output is wrong")


if __name__ == "__main__":
    main()
