"""A stage with a kernel for Hopper is tested with that one, where it would be chosen, and with the Triton kernel."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from svg_ear_compile.kernels.attention.choice import attention_kernel


def both_kernels(
    request: Any, monkeypatch: pytest.MonkeyPatch, room: str, function: str
) -> Iterator[ModuleType]:
    """kernels/<room>/triton.py, for a fixture with the parameters "triton" and "hopper": made to use one of them.

    function: of kernels/<room>/hopper.py, which must have been called in the end. The test's own parameters head_dim,
    dtype and equal say whether it would be.
    """
    package = f"svg_ear_compile.kernels.{room}"
    module = pytest.importorskip(f"{package}.triton")
    if request.param == "triton":
        monkeypatch.setattr(module, "why_not_hopper", lambda *found: "a test")
        yield module
        return
    case = {"head_dim": 128, "dtype": torch.bfloat16, "equal": True} | request.node.callspec.params
    choice = attention_kernel(torch.device("cuda"), case["dtype"], case["head_dim"], not case["equal"])
    if choice.name != "Gluon for Hopper":
        pytest.skip(choice.reason)
    hopper = importlib.import_module(f"{package}.hopper")
    used, original = [], getattr(hopper, function)
    monkeypatch.setattr(hopper, function, lambda *arguments: used.append(1) or original(*arguments))
    yield module
    assert used
