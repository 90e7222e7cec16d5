"""A clean slate for every test that compiles, and the toy model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For toy.py: --import-mode=importlib adds nothing to the path.
sys.path.insert(0, str(Path(__file__).parent))

from toy import ToyInputs, ToyVideo

from svg_ear_compile.backend import reset

# 300 skips that say the same.
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]


def pytest_report_header() -> str | None:
    return "tests/gpu is left out: there is no CUDA GPU" if collect_ignore else None


@pytest.fixture(autouse=True)
def attention_backend() -> Iterator[None]:
    """diffusers makes a backend that was set on one model the default of all: put back after each test."""
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)


@pytest.fixture
def toy() -> ToyVideo:
    return ToyVideo().eval()


@pytest.fixture
def toy_inputs() -> ToyInputs:
    return ToyInputs()


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests of a process: none needs it warm."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, inductor_cache: Path) -> Iterator[None]:
    """No graph compiled before, no Inductor cache but this run's, no SVG_EAR variables, no gradients."""
    for name in list(os.environ):
        if name.startswith("SVG_EAR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor_cache))
    torch._dynamo.reset()
    reset()  # torch only calls it where torch.compile named the backend
    with torch.no_grad():
        yield
    torch._dynamo.reset()
