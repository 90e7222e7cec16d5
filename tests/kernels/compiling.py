"""Compiles our kernels for GPUs that are not here: Triton's own compiler, and the tools in its wheel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from svg_ear_compile.kernels.attention import triton as triton_attention
from svg_ear_compile.kernels.triton_configs import config_for

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KILOBYTES = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Of shared memory that a program can have."""
STREAMS = {
    "attend": (True, True), "attend, first order": (True, True, True), "sparse_exact": (True, False),
    "centroid_compensation": (False, True),
}  # fmt: skip
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OF_THE_INPUT = ("query", "exact", "out", "query_centroids", "key_centroids", "value_centroids")
OF_THE_INPUT += ("value", "matrices", "x", "y", "x_out", "y_out", "x_means", "y_means", "high", "low")
KEYS = {"key": "BLOCK_N", "value": "BLOCK_N", "key_centroids": "BLOCK_C", "value_centroids": "BLOCK_C"}
BOXES = (*KEYS, "matrices")
KEYS |= {"high": "BLOCK_C", "low": "BLOCK_C"}
FLOATS = ("bias", "lse", "error", "gap", "mass", "parts", "norms", "shift")
FLOATS += ("start", "directions", "along", "half")
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
OTHERS = {"density": "*fp64", "state": "*i64", "ties": "*i64", "areas": "*i64", "kept": "*i1"}
OTHERS |= {"valid": "*i1", "labels": "*i16", "codes": "*i16"}
NUMBERS = ("H", "L", "N", "C", "Cq", "Ck", "tiles", "runs", "video_queries", "video_keys")
NUMBERS += ("block", "segments", "n", "group", "columns", "run")


def compiled(
    kernel: Any, capability: Any, dtype: torch.dtype, options: dict[str, Any], types: dict[str, str] | None = None,
    absent: tuple[str, ...] = (), source: Any = None, box: Any = None,
) -> Any:  # fmt: skip
    """The kernel as its launch would compile it, for tensors aligned to 16 bytes and uneven strides.

    capability: (9, 0), or the name of an AMD architecture. types: of arguments that are not what their names usually
    are. absent: arguments that are None. Gluon has a source class of its own, and box is the layout of what TMA loads.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(options)
    launch = {name: options.pop(name) for name in LAUNCH if name in options}
    element, signature, constants, attributes = NAMES[dtype], {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[(i,)] = "constexpr", options[name]
        elif name in absent:
            signature[name], constants[(i,)] = "constexpr", None
        elif name in {**OTHERS, **(types or {})}:
            signature[name] = {**OTHERS, **(types or {})}[name]
        elif name in KEYS and KEYS[name] in options:
            tile = f"tensordesc<{element}[1, {options[KEYS[name]]}, {options['BLOCK_D']}]>"
            signature[name] = tile if options["TMA"] else f"*{element}"
        elif name in BOXES and box is not None:
            signature[name] = f"tensordesc<{element}[1, 64, 64],{box!r}>"
        elif name in OF_THE_INPUT:
            signature[name] = f"*{element}"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in FLOATS:
            signature[name] = "*fp32"
        else:
            signature[name] = "i32" if "stride" in name or name in NUMBERS else "*i32"
        if "stride" in name or signature[name][0] == "*":
            attributes[(i,)] = [["tt.divisibility", 16]]
    program = (source or ASTSource)(kernel, signature, constants, attributes)
    if isinstance(capability, str):
        target = GPUTarget("hip", capability, 64)
        launch = {
            name: launch[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in launch
        }
    else:
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(program, target=target, options=launch)


def compiled_attention(
    capability: tuple[int, int], head_dim: int, dtype: torch.dtype, variable: bool, streams: str
) -> Any:
    c = config_for(capability, head_dim, dtype, variable)
    options = triton_attention.meta(c, head_dim, dtype, variable, *STREAMS[streams])
    return compiled(triton_attention.attention_kernel, capability, dtype, options)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the kernel's machine code."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
