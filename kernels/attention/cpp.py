"""Kept blocks exactly, skipped blocks by their centroids: the kernel for CPUs, in C++.

The formula is the plan's (kernels/plan.py). Each key block is first laid out as products read it. Then threads take
one query block after another: logits, weights and output of a block stay in the cache, and nothing is gathered but
the block's queries and centroids. One online softmax, all in float32, one rounding at the end.

The source, cpp_kernel.cpp, is built when the first call of LEAST_TOKENS or more comes. That takes a C++ compiler and
about two seconds, and needs nothing of PyTorch's. The library is for this process and this CPU: it is not kept.
Where it cannot be built, and for blocks of other sizes, kernels/attention/torch.py computes the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan, Terms

LEAST_TOKENS = 1024
"""Shorter calls are over before the kernel is built."""
SOURCE = Path(__file__).with_name("cpp_kernel.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared",
    "-fPIC", "-pthread",
)  # fmt: skip
_PANEL = 32  # floats of a panel's rows, on the CPU with the widest vectors


def why_not(length: int | None) -> str:
    """Why this kernel does not compute calls of equal tiles and so many tokens; "" if it does. None: long ones.

    Builds it if nothing else is in the way.
    """
    if length is not None and length < LEAST_TOKENS:
        return (
            f"calls of fewer than {LEAST_TOKENS:,} tokens are over before the faster kernel for CPUs is built"
        )
    return _built()[1]


def attend(query: Tensor, plan: SparsePlan, scale: float, out: Tensor, terms: Terms | None = None) -> Tensor:
    """As in kernels/attention/torch.py, for blocks of at most QUERY_BLOCK queries and KEY_BLOCK keys.

    Raises ValueError for larger ones, RuntimeError where the kernel cannot be built.
    """
    library, reason = _built()
    if library is None:
        raise RuntimeError(reason)
    B, H, _, D = query.shape
    Cq, Ck = plan.bias.shape[-2:]
    for offsets, most in ((plan.query_offsets, QUERY_BLOCK), (plan.key_offsets, KEY_BLOCK)):
        if int(offsets.diff(dim=-1).max()) > most:
            raise ValueError(f"a block of this plan has more than {most} tokens")
    floats = (query, plan.key, plan.value, plan.key_centroids, plan.value_centroids, plan.bias)
    ints = (plan.query_order, plan.query_offsets, plan.key_offsets, plan.kept_count, plan.kept_blocks)
    tensors = [
        floats[0].float(),
        *(x.float().contiguous() for x in floats[1:]),
        *(x.contiguous() for x in ints),
    ]
    if tensors[0].stride(-1) != 1:
        tensors[0] = tensors[0].contiguous()
    result = (
        out
        if out.dtype == torch.float32 and out.stride(-1) == 1
        else torch.empty(out.shape, dtype=torch.float32, device="cpu")
    )
    heads = 0 if terms is None else terms.matrices.shape[1]
    tensors += [] if terms is None else [terms.places.int().contiguous(), terms.matrices.float().contiguous()]
    sizes = (ctypes.c_int64 * 14)(
        B, H, query.shape[2], D, -(-D // _PANEL) * _PANEL, Cq, Ck, heads,
        *tensors[0].stride()[:3], *result.stride()[:3],
    )  # fmt: skip
    threads = torch.get_num_threads()
    needed = library.shared_floats(sizes), threads * library.thread_floats(sizes)
    scratch = [torch.empty(n, dtype=torch.float32, device="cpu") for n in needed]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*tensors, *scratch, result)]
    of_terms = pointers[11:-3] or [ctypes.c_void_p(), ctypes.c_void_p()]
    library.attend(sizes, *pointers[:11], *of_terms, ctypes.c_float(scale), threads, *pointers[-3:])
    return out if result is out else out.copy_(result)


def compiler() -> str | None:
    """$CXX, or the first C++ compiler that is found."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def _built() -> tuple[ctypes.CDLL | None, str]:
    """The kernel, or why there is none; if building it fails, also as a warning."""
    command = compiler()
    if command is None:
        return None, "there is no C++ compiler to build the faster kernel for CPUs"
    try:
        with tempfile.TemporaryDirectory(prefix="svg_ear_") as folder:
            target = Path(folder) / "attend.so"
            subprocess.run(
                [command, *FLAGS, str(SOURCE), "-o", str(target)], check=True, capture_output=True, text=True
            )
            library = ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        reason = f"the faster kernel for CPUs could not be built: {said[0] if said else repr(error)}"
        warnings.warn(f"svg_ear: {reason}", RuntimeWarning, stacklevel=4)
        return None, reason
    for name in ("shared_floats", "thread_floats"):
        getattr(library, name).restype = ctypes.c_int64
    return library, ""
