"""A clean slate for every test that compiles, and the toy model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).parent)
)  # with --import-mode=importlib, tests find toy.py by this alone

from toy import ToyInputs, ToyVideo


@pytest.fixture
def toy() -> ToyVideo:
    return ToyVideo().eval()


@pytest.fixture
def toy_inputs() -> ToyInputs:
    return ToyInputs()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No graph compiled before, no Inductor cache, no SVG_EAR variables, no gradients."""
    for name in list(os.environ):
        if name.startswith("SVG_EAR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
