"""Which attention kernel runs, why no faster one, and what the tensor memory accelerator can take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from svg_ear_compile.kernels.attention.choice import Choice, attention_kernel, why_not_hopper
from svg_ear_compile.kernels.triton_configs import assign_config_for, config_for, probe_config_for

HOPPER, CUDA = (9, 0), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "variable", "version", "word"),
    [
        (HOPPER, torch.bfloat16, 128, False, "3.6.0", ""),
        (HOPPER, torch.float16, 64, False, "3.9.1", ""),
        ((10, 0), torch.bfloat16, 128, False, "3.9.0", "sm_100"),
        ((8, 6), torch.bfloat16, 128, False, "3.9.0", "sm_86"),
        ((0, 0), torch.bfloat16, 128, False, "3.9.0", "Hopper"),
        (HOPPER, torch.float32, 128, False, "3.9.0", "not float32"),
        (HOPPER, torch.bfloat16, 100, False, "3.9.0", "not 100"),
        (HOPPER, torch.bfloat16, 128, True, "3.9.0", "clusters"),
        (HOPPER, torch.bfloat16, 128, False, "3.5.1", "Triton 3.6 to 3.9, this is 3.5.1"),
        (HOPPER, torch.bfloat16, 128, False, "3.10.0+git1", "Triton 3.6 to 3.9, this is 3.10.0+git1"),
        (HOPPER, torch.bfloat16, 128, False, "4.0.0", "Triton 3.6 to 3.9, this is 4.0.0"),
    ],
)
def test_why_not_the_kernel_for_hopper(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, variable: bool, version: str, word: str
) -> None:
    pytest.importorskip("triton")
    why_not = why_not_hopper(capability, dtype, head_dim, variable, version)
    assert word in why_not if word else not why_not


def test_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    assert attention_kernel(CUDA, torch.bfloat16, 128) == Choice("Gluon for Hopper", "")
    assert attention_kernel(CUDA, torch.bfloat16, 128, variable=True).name == "Triton"
    monkeypatch.setattr(triton, "__version__", "3.11.0")
    name, reason = attention_kernel(CUDA, torch.bfloat16, 128)
    assert name == "Triton"
    assert "3.11.0" in reason
    assert attention_kernel(CUDA, torch.bfloat16, 257) == Choice(
        "dense", "head_dim is 257; the Triton kernels take up to 256"
    )
    monkeypatch.setitem(
        sys.modules, "svg_ear_compile.kernels.triton_tiles", None
    )  # as where triton is missing
    assert attention_kernel(CUDA, torch.bfloat16, 128).name == "dense"
    assert attention_kernel(torch.device("cpu"), torch.bfloat16, 128).name == "PyTorch"


@pytest.mark.slow
def test_on_a_cpu_triton_is_not_imported() -> None:
    code = (
        "import sys, torch; from svg_ear_compile.kernels.attention.choice import attention_kernel;"
        "attention_kernel(torch.device('cpu'), torch.float32, 64); print('triton' in sys.modules)"
    )
    before = "import sys, torch; print('triton' in sys.modules)"
    found = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True)
        for c in (before, code)
    ]
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_tiles_come_by_tma_where_rows_are_whole_16_bytes(capability: tuple[int, int]) -> None:
    for head_dim in range(1, 257):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            configs = [config_for(capability, head_dim, dtype, variable) for variable in (False, True)]
            configs += [f(capability, head_dim, dtype) for f in (probe_config_for, assign_config_for)]
            whole = head_dim * dtype.itemsize % 16 == 0
            wanted = whole and capability[0] in (9, 10) and dtype != torch.float32
            assert {c.tma for c in configs} == {wanted}


def test_amd_gpus_are_not_taken_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm calls its devices cuda, and MI250 has "compute capability" 9.0."""
    triton_tiles = pytest.importorskip("svg_ear_compile.kernels.triton_tiles")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    device = torch.device("cuda")
    assert triton_tiles.capability(device) == (9, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_tiles.capability(device) == (8, 0)
    assert attention_kernel(device, torch.bfloat16, 128).name == "Triton"
