"""Every kernel once, on small odd shapes: what compute-sanitizer watches (make sanitize).

Without the caching allocator (PYTORCH_NO_CUDA_MEMORY_CACHING=1) each tensor has an allocation of its own, so
that a read past its end is seen. The outputs are compared with the joint softmax of the plans: a watched
run that computes nothing would pass.

    --plain     without the Gluon kernels: Triton's own dialect alone, whose races are all reported, and those
                of no dense kernel of cuDNN's, where racecheck finds some
    --control   no kernel of ours, but one that only starts its groups of warps by gl.warp_specialize

racecheck does not understand how Triton hands arguments over to groups of warps (gl.warp_specialize: through
shared memory, ordered by barriers that each group reaches at an instruction of its own). It reports hazards
between the first line of such a kernel and the line of the call, in the control as in ours.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from svg_ear_compile.kernels import context, ops, reference  # noqa: F401 - ops registers
from svg_ear_compile.kernels.attention import triton as triton_attention
from svg_ear_compile.kernels.plan import SparsePlan
from svg_ear_compile.kernels.probe import triton as triton_probe

TEXT, GRID = 19, (3, 7, 11)
CASES: tuple[tuple[str, str, int, torch.dtype], ...] = (
    ("cubes", "output_error", 128, torch.bfloat16),
    ("cubes", "output_error", 64, torch.float16),
    ("splits", "output_error", 96, torch.bfloat16),
    ("kmeans", "svg_ear", 128, torch.bfloat16),
)


@gluon.jit
def _fill(out, first, value, COUNT: gl.constexpr):
    """Numbers change threads on their way, which takes shared memory and barriers of the group's own."""
    warps: gl.constexpr = COUNT // 32
    there: gl.constexpr = gl.BlockedLayout([4], [32], [warps], [0])
    here: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    for i in range(3):
        numbers = gl.convert_layout(gl.arange(0, 4 * COUNT, there), here)
        gl.store(out + first + gl.convert_layout(numbers, there), value + i)


@gluon.jit
def control_kernel(out, value):
    out += gl.program_id(0) * 1152
    gl.warp_specialize(
        [
            (_fill, (out, 0, value, gl.constexpr(128))),
            (_fill, (out, 512, value, gl.constexpr(128))),
            (_fill, (out, 1024, value, gl.constexpr(32))),
        ],
        [4, 1],
        [240, 24],
    )


def control() -> None:
    out = torch.zeros(64 * 1152, device="cuda", dtype=torch.int32)
    control_kernel[(64,)](out, 5, num_warps=4, maxnreg=168)
    if not (out == 7).all():
        raise SystemExit("the output is wrong")


def every_kernel() -> None:
    length = math.prod(GRID) + TEXT
    random = torch.Generator("cuda").manual_seed(0)
    for (order, routing, head_dim, dtype), masked in itertools.product(CASES, (False, True)):
        x = torch.randn(3, 2, length, 2, head_dim, device="cuda", generator=random).to(dtype)
        query, key, value = x.transpose(2, 3)
        mask = torch.ones(2, 1, 1, length, device="cuda", dtype=torch.bool)
        mask[1, ..., -7:] = False
        seen = mask if masked else None
        fixed: tuple[Any, ...] = (None, TEXT, False, list(GRID), order, routing, True, 0.3, 0, 0)
        terms = (order != "kmeans", False)  # the presets of the papers have none
        tried = context.Measure(1, (0.3,), (), any(terms))
        decision = context.SiteDecision(density=0.3, first_order=terms, measure=tried)
        with context.active(context.RunContext(context.Decisions({0: decision}, strict=True))):
            out = torch.ops.svg_ear.attention(query, key, value, seen, *fixed)
            parts = torch.ops.svg_ear.clustered_permute(query, key, value, seen, *fixed)
            exact = torch.ops.svg_ear.sparse_exact(query, key, value, seen, *parts, *fixed)
            merged = torch.ops.svg_ear.centroid_compensation(query, *exact, *parts, *fixed)
        plan, scale = SparsePlan(*parts), head_dim**-0.5
        for name, got, first_order in (("attention", out, terms), ("three ops", merged, ())):
            expected = reference.joint_softmax(query, plan, scale, first_order=first_order)
            error = ((got - expected).norm() / expected.norm()).item()
            print(f"{order} {routing} {head_dim} {dtype} mask {masked} {name}: error {error:.1e}", flush=True)
            if not error < 0.02:
                raise SystemExit("the output is wrong")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--control", action="store_true")
    args = parser.parse_args()
    if args.control:
        control()
    elif args.plain:
        of_attention, of_probe = (
            mock.patch.object(module, "why_not_hopper", return_value="a test")
            for module in (triton_attention, triton_probe)
        )
        with of_attention, of_probe, sdpa_kernel(SDPBackend.MATH):
            every_kernel()
    else:
        every_kernel()


if __name__ == "__main__":
    main()
