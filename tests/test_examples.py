"""Every example runs as it stands, in a process of its own that imports nothing of ours by name."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, tmp_path: Path, **environment: str) -> tuple[str, list[dict[str, object]]]:
    """(standard output, the sites of the report) of an example."""
    assert "svg_ear_compile" not in (EXAMPLES / name).read_text()
    report = tmp_path / "report.json"
    variables = {
        "SVG_EAR_REPORT": str(report),
        "SVG_EAR_INNER": "eager",
    }  # Inductor: test_backend_inductor.py
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, **variables, **environment},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sites = [site for graph in json.loads(report.read_text())["graphs"] for site in graph["sites"]]
    return done.stdout, sites


def decisions(sites: list[dict[str, object]]) -> dict[str, bool]:
    return {str(site["module_path"]): bool(site["rewritten"]) for site in sites}


@pytest.mark.slow
def test_whole_model(tmp_path: Path) -> None:
    """Self attention is rewritten, cross attention is dense and says why."""
    printed, sites = run("whole_model.py", tmp_path)
    wanted = {f"blocks.{i}.attn1": True for i in range(2)} | {f"blocks.{i}.attn2": False for i in range(2)}
    assert decisions(sites) == wanted
    assert all("cross attention" in str(s["sentence"]) for s in sites if not s["rewritten"])
    difference = float(printed.split()[-1])
    assert 0 < difference < 0.1


@pytest.mark.slow
def test_the_report_in_the_readme_is_the_example_s() -> None:
    """The table; what was measured differs from run to run."""
    command = [sys.executable, str(EXAMPLES / "whole_model.py")]
    variables = os.environ | {"SVG_EAR_REPORT": "1", "SVG_EAR_INNER": "eager"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    table = said[said.index("site  ") : said.index("of all FLOPs")]
    assert table.count("\n") > 6
    assert table in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="needs torch 2.13")
def test_unmodified(tmp_path: Path) -> None:
    """SVG_EAR=1 alone."""
    printed, sites = run(
        "unmodified.py", tmp_path, SVG_EAR="1", SVG_EAR_MIN_TOKENS="256", SVG_EAR_DENSE_STEPS="0"
    )
    assert "[1, 4, 4, 32, 32]" in printed
    assert decisions(sites) == {"blocks.0.attn1": True, "blocks.0.attn2": False,
                                "blocks.1.attn1": True, "blocks.1.attn2": False}  # fmt: skip


TINY = {
    "wan_t2v": 1, "wan_i2v": 1, "wan22": 2, "hunyuan_video": 1, "cogvideox": 1, "ltx2": 1, "lora": 1, "offload": 1,
    "cache": 1, "own_loop": 1, "minimax_h3": 1,
}  # fmt: skip
"""How many models of each are compiled."""


def run_tiny(name: str, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SVG_EAR_STRICT": "1"}
    command = [sys.executable, *before, str(EXAMPLES / f"{name}.py"), "--tiny"]
    return subprocess.run(
        command, env=clean | variables, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


def sparse_calls(said: str) -> int:
    return int(said.split("calls of rewritten sites: ")[1].split(" sparse")[0])


@pytest.mark.usefixtures("fresh")
def test_tiny_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wan_t2v.py", "--tiny"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "wan_t2v.py"), run_name="__main__")
    assert_sparse("wan_t2v", capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_tiny(name: str, tmp_path: Path) -> None:
    done = run_tiny(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_sparse(name, done.stdout, tmp_path)
    if name == "lora":
        assert "graphs before and after the swap: 1 1" in done.stdout


def assert_sparse(name: str, said: str, folder: Path) -> None:
    assert said.count("block by block") + said.count("as a whole") == TINY[name]
    assert sparse_calls(said) > 0
    assert [*folder.glob("outputs/*.mp4")] or "latents (" in said


@pytest.mark.slow
def test_tiny_on_two_ranks(tmp_path: Path) -> None:
    done = run_tiny("ulysses", tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("block by block") == 1, "one rank speaks"
    assert done.stdout.count("median error") == 1, "of all"
    assert sparse_calls(done.stdout) > 0


@pytest.mark.slow
def test_tiny_images_are_untouched(tmp_path: Path) -> None:
    done = run_tiny("image_untouched", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "there is nothing to do" in done.stdout
    assert "svg_ear: nothing compiled yet" in done.stdout


@pytest.mark.slow
def test_tiny_in_8_bits(tmp_path: Path) -> None:
    done = run_tiny("fp8", tmp_path)
    if find_spec("torchao"):
        assert done.returncode == 0, done.stderr
        assert sparse_calls(done.stdout) > 0
    else:
        assert (done.returncode, done.stderr.strip()) == (1, "torchao is not installed: pip install torchao")


def test_each_example_is_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*TINY, "common", "fp8", "image_untouched", "ulysses", "unmodified", "whole_model"}
