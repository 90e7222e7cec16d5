"""Each command of `svg-ear`: what it finds, as text and as JSON, its exit status, and what it says of mistakes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from svg_ear_compile import cli
from svg_ear_compile.commands import bench
from svg_ear_compile.reporting import diagnostics

MODEL = """
import sys, torch
from diffusers import WanTransformer3DModel

def main():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()
    COMPILE
    with torch.no_grad():
        video, timestep, text = torch.randn(1, 4, 4, 32, 32), torch.tensor([500]), torch.randn(1, 12, 16)
        print(model(video, timestep, text, return_dict=False)[0].shape, sys.argv[1:])
    END

main()
"""
SMALL = {"SVG_EAR_MIN_TOKENS": "256", "SVG_EAR_DENSE_STEPS": "0", "SVG_EAR_INNER": "eager"}


def script(tmp_path: Path, compiles: str = "", end: str = "") -> str:
    path = tmp_path / "model.py"
    path.write_text(MODEL.replace("COMPILE", compiles).replace("END", end))
    return str(path)


def svg_ear(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    command = [sys.executable, "-m", "svg_ear_compile.cli", *arguments]
    return subprocess.run(command, env={**clean, **SMALL}, capture_output=True, text=True, check=False)


def found(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """What a command prints as JSON in this process."""
    assert cli.main([arguments[0], "--json", *arguments[1:]]) == status
    return json.loads(capsys.readouterr().out)


# --- doctor ---


def test_doctor_finds_nothing_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SVG_EAR")]:
        monkeypatch.delenv(name)
    checks = {check["name"]: check for check in found(capsys, "doctor")}
    assert torch.__version__ in checks["versions"]["found"]
    assert checks["self-test"]["ok"]
    assert checks["entry points"]["ok"]
    assert checks["autoload"]["ok"] or not hasattr(torch.compiler, "set_default_backend")
    if not torch.cuda.is_available():
        assert "CUDA GPU" in checks["GPU"]["hint"]
        assert checks["kernel"]["found"].startswith("PyTorch for bfloat16 64")


def test_doctor_says_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVG_EAR_DENSITY", "7")
    monkeypatch.setattr("svg_ear_compile.kernels.attention.torch.attend", None)
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "broken: variables, self-test" in told
    assert "SVG_EAR_DENSITY = '7': allowed is 0 < density <= 1\n" in told


# --- run and explain ---


@pytest.mark.usefixtures("fresh")
def test_run_and_explain_compile_what_the_script_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which changes with the script."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(diagnostics, "_collects", False)
    for name, value in {**SMALL, "SVG_EAR": ""}.items():
        monkeypatch.setenv(name, value)
    for command, calls in (("run", 2), ("explain", 0)):
        told = found(capsys, command, "--compile", script(tmp_path))
        assert told["totals"]["sparse_calls"] == calls
        torch._dynamo.reset()  # else the second model would use the graph of the first
        diagnostics.clear()


@pytest.mark.slow
def test_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The model is gone when the script ends; what was found is not."""
    report = tmp_path / "report.json"
    done = svg_ear("run", "--compile", "--json", "--report", str(report), script(tmp_path), "a", "--b")
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 4, 4, 32, 32]) ['a', '--b']" in done.stderr
    assert "svg_ear: WanTransformer3DModel block by block" in done.stderr
    told = json.loads(done.stdout)
    assert told["totals"]["sparse_calls"] == 2
    assert json.loads(report.read_text())["totals"] == told["totals"]


@pytest.mark.slow
def test_run_leaves_what_the_script_compiles(tmp_path: Path) -> None:
    done = svg_ear("run", "--compile", script(tmp_path, "model.compile()"))
    assert done.returncode == 0, done.stderr
    assert "WanTransformer3DModel block by block" not in done.stderr
    assert "2 of 4 attention sites rewritten" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no clip')", 1, "no clip"),
        ("raise ValueError(7)", 1, "ValueError: 7"),
    ],
)
def test_run_ends_as_the_script_does(tmp_path: Path, end: str, status: int, said: str) -> None:
    done = svg_ear("run", script(tmp_path, "model = torch.compile(model)", end))
    assert done.returncode == status
    assert said in done.stderr
    assert "calls of rewritten sites: 2 sparse, 0 dense" in done.stdout


@pytest.mark.slow
def test_explain_rewrites_nothing(tmp_path: Path) -> None:
    done = svg_ear("explain", script(tmp_path, "model = torch.compile(model)"))
    assert done.returncode == 0, done.stderr
    assert "2 of 4 attention sites would be rewritten, with 98.8% of the attention FLOPs" in done.stdout
    assert "sparse, " not in done.stdout
    done = svg_ear("explain", script(tmp_path))
    assert done.returncode == 1
    assert "svg_ear: nothing was compiled" in done.stdout
    assert "--compile" in done.stdout


def test_a_script_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "nothing.py"]) == 1
    assert "nothing.py is no file: pass the path of a Python script" in capsys.readouterr().err


# --- bench ---


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--grid", "2x8x8", "--grid", "4x8x16", "--heads", "1", "--head-dim", "16", "--repeats", "1"]
    told = found(capsys, "bench", "--out", str(out), *arguments)
    assert json.loads(out.read_text()) == told
    assert [row["tokens"] for row in told["rows"]] == [128, 512]
    assert told["kernel"]["name"] == "PyTorch"
    assert {"python", "torch"} <= set(told["versions"])
    assert "system" in told["hardware"]
    errors = [row["sparse"]["0.25"]["error"] for row in told["rows"]]
    assert all(0 < error < 1 for error in errors)
    assert cli.main(["bench", *arguments]) == 0
    assert "density 0.25: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--grid", "64"])
    assert "'64' is not FRAMESxHEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.5, 0.5], 1500),
        ([0.9, 0.5], 1000),
        ([1.5, 1.0], None),
        ([0.9, 1.2, 0.8], 2500),
        ([3.0, 1.2, 0.2], 2200),
    ],
)
def test_break_even(ratios: list[float], expected: int | None) -> None:
    rows = [
        {"tokens": 1000 * (i + 1), "dense_ms": 10.0, "sparse": {"0.1": {"ms": 10 * ratio}}}
        for i, ratio in enumerate(ratios)
    ]
    assert bench.break_even(rows, "0.1") == expected


# --- compare ---


def write(path: Path, level: float) -> str:
    import imageio.v3 as iio

    moving = torch.linspace(0, 60, 4).view(4, 1, 1, 1) + torch.linspace(0, 60, 64).view(1, 1, 64, 1)
    iio.imwrite(path, (moving + level).expand(4, 48, 64, 3).byte().numpy(), fps=8)
    return str(path)


def test_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    a, b, out = write(tmp_path / "a.mp4", 60), write(tmp_path / "b.mp4", 70), tmp_path / "out"
    told = found(capsys, "compare", a, b, "--out", str(out))
    assert told["clip"]["psnr"] == pytest.approx(-20 * math.log10(10 / 255), abs=1.5), "mp4 rounds"
    assert {len(values) for values in told["frames"].values()} == {4}
    assert told["note"] or 0 < told["clip"]["vmaf"] <= 100
    assert {path.name for path in out.iterdir()} == {"side_by_side.mp4", "difference.mp4", "compare.json"}
    assert json.loads((out / "compare.json").read_text()) == told
    assert cli.main(["compare", a, a, "--out", str(out)]) == 0
    assert "the whole clip: PSNR equal, SSIM 1" in capsys.readouterr().out


def test_compare_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import imageio.v3 as iio

    small, large = tmp_path / "small.png", tmp_path / "large.png"
    iio.imwrite(small, torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    iio.imwrite(large, torch.zeros(8, 16, 3, dtype=torch.uint8).numpy())
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for b, said in (
        (large, "sample both with the same size"),
        (text, "cannot be read"),
        (tmp_path / "x.mp4", "not exist"),
    ):
        assert cli.main(["compare", str(small), str(b)]) == 1
        assert said in capsys.readouterr().err


# --- all of them ---


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert "--json" in capsys.readouterr().out


def test_parsing_imports_no_torch() -> None:
    """`svg-ear run` sets variables that must be there before torch is imported."""
    code = (
        "import sys; from svg_ear_compile import cli\ntry: cli.main(['run', '-h'])\nexcept SystemExit: pass\n"
    )
    code += "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'diffusers')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
