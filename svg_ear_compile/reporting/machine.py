"""On what did this run? Versions, hardware, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import distributions

import torch

PACKAGES = (
    "svg-ear-compile",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "torchao",
)


def versions() -> dict[str, str]:
    """Of Python and the packages that are installed."""
    installed = {name: d.version for d in distributions() if (name := d.metadata["Name"]) in PACKAGES}
    return {"python": platform.python_version()} | {
        name: installed[name] for name in PACKAGES if name in installed
    }


def hardware() -> dict[str, str]:
    """The system, and each GPU that torch sees."""
    found = {"system": f"{platform.platform()}, {os.cpu_count()} CPU cores"}
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        size = f"{about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        found[f"GPU {i}"] = f"{about.name}, sm_{about.major}{about.minor}, {size}"
    return found


def peak_memory() -> dict[str, float]:
    """GiB at most so far: of this process, and what torch has allocated on each GPU that was used."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if peak := torch.cuda.max_memory_allocated(i):
                found[f"GPU {i}"] = peak / 2**30
    return found
