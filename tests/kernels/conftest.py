"""One thread (kernel tests are small: on a busy machine threads make them many times slower), and spies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svg_ear_compile.kernels import context, planning
from svg_ear_compile.kernels.plan import SparsePlan

# For op_calls.py: --import-mode=importlib adds nothing to the path.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[SparsePlan]:
    """The plans that the ops make."""
    made: list[SparsePlan] = []
    make_plan = planning.make_plan

    def spy(*args: Any) -> SparsePlan:
        made.append(make_plan(*args))
        return made[-1]

    monkeypatch.setattr(planning, "make_plan", spy)
    return made


@pytest.fixture
def strict() -> Iterator[context.RunContext]:
    """A call in which no error hides behind dense attention."""
    call = context.RunContext(context.Decisions(strict=True))
    with context.active(call):
        yield call
