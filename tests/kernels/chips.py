"""What does each kernel take of each GPU, as Triton compiles it? Needs no GPU.

    python tests/kernels/chips.py [gfx942]

A markdown table for docs/PERFORMANCE.md: bfloat16, head_dim 128, equal tiles. Of NVIDIA GPUs registers a thread, KB of
shared memory, programs that a multiprocessor holds at a time; of AMD GPUs vector registers, KB of LDS, and registers
that wait in memory.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compiling import KILOBYTES, compiled, resources
from tabulate import tabulate
from tqdm import tqdm

from svg_ear_compile.kernels.attention import covariance_triton
from svg_ear_compile.kernels.attention import triton as attention
from svg_ear_compile.kernels.blocks import permute_triton as permute
from svg_ear_compile.kernels.measuring import rows_triton as rows
from svg_ear_compile.kernels.probe import triton as probe
from svg_ear_compile.kernels.routing import triton as routing
from svg_ear_compile.kernels.triton_configs import config_for, probe_config_for

REGISTERS = 65_536
THREADS = {(8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048, (10, 0): 2048, (12, 0): 1536}
SHARED = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228, (10, 0): 228, (12, 0): 100}
"""Of a multiprocessor: threads, and KB of shared memory, of which each program takes one more than it asks for."""
D, DTYPE = 128, torch.bfloat16
POINTERS = (8, 0)
"""The configuration without tensor memory accelerators, for GPUs of other makers."""


def kernels(capability: Any) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], tuple[str, ...]]]:
    """(name, kernel, options, types, absent arguments), as `compiled` takes them."""
    known = capability if isinstance(capability, tuple) else POINTERS
    config = config_for(known, D, DTYPE, False)
    for name, streams in (("attention", (True, True)), ("with first-order terms", (True, True, True))):
        yield name, attention.attention_kernel, attention.meta(config, D, DTYPE, False, *streams), {}, ()
    options = probe.meta(probe_config_for(known, D, DTYPE), D, DTYPE, False, True)
    yield "probe", probe.probe_kernel, options, {}, ("mass",)
    yield "permutation", permute.gather_kernel, permute.meta(D, True), {}, ()
    yield "threshold", routing.search_kernel, routing.search_meta(1), {}, ()
    yield "lists", routing.lists_kernel, routing.lists_meta(True, True, True), {}, ("kept",)
    types = {"heads": "*i64", "key": "*bf16", "bias": "*fp32"}
    yield "covariances", covariance_triton.covariance_kernel, covariance_triton.meta(D, DTYPE), types, ()
    types = {"key": "*bf16", "blocks": "*i64", "out": "*fp32", "share": "*fp32"}
    yield "measured rows", rows.rows_kernel, rows.meta(known, D, DTYPE), types, ()


def takes(kernel: Any, capability: Any, folder: Path) -> str:
    if isinstance(capability, str):
        text = kernel.asm["amdgcn"]
        used = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        shared = kernel.metadata.shared / 1024
        return f"{used['vgpr_count']}, {shared:.0f} KB, {used['vgpr_spill_count']}"
    registers = resources(kernel, folder)["REG"]
    threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared / 1024
    in_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    programs = min(in_registers, THREADS[capability] // threads, int(SHARED[capability] // (shared + 1)))
    return f"{registers}, {shared:.0f} KB, {programs} x {kernel.metadata.num_warps}"


def table(capabilities: list[Any]) -> str:
    cells: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for capability in tqdm(capabilities, unit="GPU", disable=None):
            for name, kernel, options, types, absent in kernels(capability):
                made = compiled(kernel, capability, DTYPE, options, types, absent)
                cells.setdefault(name, []).append(takes(made, capability, Path(folder)))
    names = [c if isinstance(c, str) else "sm_{}{}".format(*c) for c in capabilities]
    return tabulate([[name, *row] for name, row in cells.items()], ["kernel", *names], tablefmt="github")


if __name__ == "__main__":
    print(table(list(sys.argv[1:]) or list(KILOBYTES)))
