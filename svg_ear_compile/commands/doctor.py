"""What runs on this machine, and what keeps the rest from running?

Versions, GPUs, kernels, whether SVG_EAR=1 can work, and a short self-test. The exit status is 1 if something is broken.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any

from . import Outcome


@dataclass(frozen=True)
class Check:
    """ok: False is a fault, None is a fact. hint: what to do about it."""

    name: str
    ok: bool | None
    found: str
    hint: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> Outcome:
    checks = [*_machine(), *_kernels(), *_switches(), _self_test()]
    words = {True: "ok", False: "FAULT", None: ""}
    lines = [
        f"{words[c.ok]:6}{c.name:16}{c.found}" + (f"\n{'':22}-> {c.hint}" if c.hint else "") for c in checks
    ]
    faults = [c.name for c in checks if c.ok is False]
    lines.append("broken: " + ", ".join(faults) if faults else "nothing is broken")
    return Outcome([asdict(c) for c in checks], "\n".join(lines), int(bool(faults)))


def _machine() -> Iterator[Check]:
    import torch

    from ..demo import can_compile
    from ..reporting import machine

    found = machine.versions()
    yield Check("versions", None, ", ".join(f"{name} {number}" for name, number in found.items()))
    for name, text in machine.hardware().items():
        yield Check(name, None, text)
    if "diffusers" not in found:
        yield Check(
            "diffusers", None, "missing", "pip install 'svg-ear-compile[video]', unless the model is your own"
        )
    if not torch.cuda.is_available():
        yield Check(
            "GPU", None, "torch sees none", "the speed needs a CUDA GPU, and a torch that is built for it"
        )
    if not can_compile(torch.device("cpu")):
        hint = (
            'install g++ and the Python headers, or set SVG_EAR_INNER=eager (and backend="eager" elsewhere)'
        )
        yield Check("C++ compiler", None, "missing: Inductor cannot compile for the CPU", hint)


def _kernels() -> Iterator[Check]:
    """Which attention kernel runs, by dtype and head_dim."""
    import torch

    from ..kernels.attention.choice import attention_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[Any, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (64, 128):
            name = f"{str(dtype).removeprefix('torch.')} {head_dim}"
            rows.setdefault(attention_kernel(device, dtype, head_dim), []).append(name)
    for (kernel, reason), names in rows.items():
        found = f"{kernel} for {', '.join(names)}" + (f": {reason}" if reason else "")
        yield Check("kernel", False if kernel == "dense" else None, found)


def _switches() -> Iterator[Check]:
    import torch

    from ..exceptions import SettingsError
    from ..precedence import resolve

    names = {
        group: [e.name for e in entry_points(group=group)]
        for group in ("torch.backends", "torch_dynamo_backends")
    }
    if all("svg_ear" in found for found in names.values()):
        yield Check("entry points", True, 'backend="svg_ear" and SVG_EAR=1 are registered with torch')
    else:
        yield Check(
            "entry points",
            False,
            "torch does not find svg_ear",
            "pip install svg-ear-compile (-e . in a checkout)",
        )
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield Check("autoload", None, "off: SVG_EAR=1 does nothing", "unset TORCH_DEVICE_BACKEND_AUTOLOAD")
    elif not hasattr(torch.compiler, "set_default_backend"):
        hint = 'torch 2.13 or newer, or backend="svg_ear" in the script'
        yield Check("autoload", None, "this torch has no default backend: SVG_EAR=1 does nothing", hint)
    else:
        yield Check("autoload", True, "SVG_EAR=1 works")
    ours = {name: value for name, value in os.environ.items() if name.startswith("SVG_EAR")}
    try:
        resolve()
        yield Check(
            "variables",
            True if ours else None,
            ", ".join(f"{k}={v}" for k, v in ours.items()) or "none are set",
        )
    except SettingsError as error:
        yield Check("variables", False, str(error), "docs/ENVS.md lists what is allowed")


def _self_test() -> Check:
    """Sparse attention against the formula in float64, in the dtype that models use here."""
    import torch

    from ..functional import attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 1024, 64, generator=g).to(device, dtype) for _ in range(3))
    try:
        with torch.no_grad():
            options: dict[str, Any] = {"grid": (4, 16, 16), "density": 0.25}
            got, wanted = (
                attention(query, key, value, **options),
                attention(query, key, value, impl="reference", **options),
            )
            dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            exact = torch.nn.functional.scaled_dot_product_attention(
                query.double(), key.double(), value.double()
            )
        off, plain = (
            ((a.double() - b.double()).norm() / b.double().norm()).item()
            for a, b in ((got, wanted), (dense, exact))
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user came to see
        return Check("self-test", False, repr(error), "please report this with the lines above")
    text = f"{off:.1e} from the formula (dense attention of torch: {plain:.1e})"
    if off <= 2 * plain:
        return Check("self-test", True, text)
    return Check("self-test", False, text, "please report this with the lines above")
