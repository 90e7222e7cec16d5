"""Shows the facts of docs/FACTS.md that need no GPU, one function each.

    python docs/facts.py             all of them
    python docs/facts.py f_locals    one

A fact that is no longer so is an assertion that fails: then the code that lives with it can be made simpler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import nn


@triton.jit
def _largest(x, out):
    values = tl.load(x + tl.arange(0, 128))
    tl.store(out, tl.max(values, 0))


def max_ignores_nan() -> str:
    """tl.max is max.f32 in machine code, which returns the other operand where one is NaN."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(_largest, {"x": "*fp32", "out": "*fp32"}, {}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "max.f32" in ptx
    assert "max.NaN" not in ptx
    return "max.f32"


@triton.jit
def _add(x, y, out):
    place = tl.arange(0, 16)
    tl.store(out + place, tl.load(x + place) + tl.load(y + place))


def interpreter_bfloat16() -> str:
    """Triton's interpreter adds bfloat16 numbers as if their bits were integers; float32 and float16 are right."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # it must be set before Triton is imported
        command = [sys.executable, __file__, "interpreter_bfloat16"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return text.strip().partition(": ")[2]
    wrong = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, y, out = (
            torch.ones(16, dtype=dtype),
            torch.full((16,), 2.0, dtype=dtype),
            torch.empty(16, dtype=dtype),
        )
        _add[(1,)](x, y, out)
        if not torch.equal(out, x + y):
            wrong.append(f"1 + 2 = {out[0]:g} in {dtype}")
    assert len(wrong) == 1
    return wrong[0]


def f_locals() -> str:
    """Up to Python 3.12 reading f_locals keeps all values of a frame alive until it returns."""

    def holds(look: bool) -> bool:
        module = nn.Module()
        alive = weakref.ref(module)
        if look:
            assert "module" in sys._getframe().f_locals
        del module
        return alive() is not None

    assert not holds(look=False)
    assert holds(look=True) == (sys.version_info < (3, 13))
    return f"kept alive: {holds(look=True)}"


def weak_references() -> str:
    """A parameter that somebody refers to weakly cannot be swapped."""
    x, y = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    torch.utils.swap_tensors(x, y)
    reference = weakref.ref(x)
    try:
        torch.utils.swap_tensors(x, y)
    except RuntimeError as error:
        assert reference() is x
        return str(error).split("\n")[0]
    raise AssertionError("swapped")


def mode_and_options() -> str:
    """torch.compile takes mode= or options=, not both."""
    try:
        torch.compile(nn.Identity(), mode="max-autotune", options={"max_autotune": True})
    except RuntimeError as error:
        return str(error)
    raise AssertionError("both are taken")


@torch.library.custom_op("svg_ear_facts::identity", mutates_args=())
def _identity(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x).clone()


def _microseconds(call: Callable[[torch.Tensor], torch.Tensor]) -> float:
    x, times = torch.zeros(1), []
    for _ in range(2000):
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def custom_op() -> str:
    """A call of a torch.library.custom_op takes several microseconds longer than the function in it."""
    with torch.no_grad():
        extra = _microseconds(_identity) - _microseconds(lambda x: x.view_as(x).clone())
    assert extra > 1
    return f"{extra:.1f} microseconds"


def views_of_a_loop() -> str:
    """An iterated tensor gives views: their place in it is the step that a loop is at."""
    steps = torch.linspace(1, 0, 4)
    places = [t.storage_offset() for t in steps]
    assert places == [0, 1, 2, 3]
    assert all(t.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr() for t in steps)
    return str(places)


FACTS = (
    max_ignores_nan,
    interpreter_bfloat16,
    f_locals,
    weak_references,
    mode_and_options,
    custom_op,
    views_of_a_loop,
)


def main(names: list[str]) -> None:
    for fact in FACTS:
        if not names or fact.__name__ in names:
            print(f"{fact.__name__}: {fact()}")


if __name__ == "__main__":
    main(sys.argv[1:])
