"""benchmarks/quality.py on toy models, and the table and picture made of its results."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def import_benchmark(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("model", ["wan", "hunyuan", "cogvideox"])
def test_every_model_is_measured(model: str, tmp_path: Path) -> None:
    """Two layers with random weights, of which the second is sparse."""
    benchmark = import_benchmark("quality")
    torch.manual_seed(0)
    layers = {"num_layers": 1, "num_single_layers": 1} if model == "hunyuan" else {"num_layers": 2}
    network = dataclasses.replace(benchmark.KINDS[model], toy=layers).build(toy=True)
    for name, parameter in network.named_parameters():
        if not parameter.any() and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith(("to_q.weight", "to_k.weight")):
            parameter.data.mul_(4)  # attention that is far from uniform
    network.save_pretrained(tmp_path / "export")
    rows = benchmark.measure(
        steps=3, size=(4, 64, 64), density=(0.3,), device="cpu", inner="eager", model=model,
        weights=tmp_path / "export", clips=1, guidance=1.0,
    )  # fmt: skip
    assert [(r.name, r.asked) for r in rows] == [("dense", 1.0), *((name, 0.3) for name in benchmark.RUNS)]
    for row in rows[1:]:
        assert row.density == pytest.approx(0.3, abs=0.08)
        assert row.step_seconds > 0
    psnr = {row.name: statistics.mean(row.psnr) for row in rows}
    assert 10 < psnr["default, skipped blocks dropped"] < psnr["default"] < 100


def test_a_model_without_weights_says_where_they_come_from() -> None:
    with pytest.raises(ValueError, match="--model hunyuan"):
        import_benchmark("quality").measure(model="hunyuan", device="cpu")


def test_table_and_picture_from_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, plot = import_benchmark("quality"), import_benchmark("quality_plot")
    rows = [benchmark.Row("wan", "dense", 1.0, 1.0, [math.inf], [1.0], 0.02)]
    rows += [
        benchmark.Row("wan", name, asked, asked, [20 + 40 * asked, 30.0], [0.9, 0.9], 0.01)
        for name in benchmark.RUNS
        for asked in (0.1, 0.2)
    ]
    benchmark.write(rows, tmp_path / "rows.json", {"device": "cpu", "steps": 30})
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["psnr"] == [None]
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{plot.MARK}\nold\n{plot.MARK}\nafter {plot.MARK}\n")
    plot.main([str(tmp_path / "rows.json"), str(tmp_path / "picture.png"), str(page)])
    printed = page.read_text()
    assert benchmark.table(rows, "github") in printed
    assert printed.startswith(f"Before\n{plot.MARK}\n")
    assert printed.endswith(f"\n{plot.MARK}\nafter {plot.MARK}\n")
    assert "old" not in printed
    paper = next(line for line in printed.splitlines() if "the paper" in line and " 0.20 |" in line)
    assert [cell.strip() for cell in paper.split("|")[5:10]] == ["29.00", "28.00", "0.9000", "0.0100", "0.50"]
    assert (tmp_path / "picture.png").stat().st_size > 1000
