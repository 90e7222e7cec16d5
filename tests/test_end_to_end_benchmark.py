"""benchmarks/end_to_end.py on toy pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark import import_benchmark

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow


def results(tmp_path: Path, line: str) -> dict[str, Any]:
    path = tmp_path / "results.json"
    import_benchmark("end_to_end").main([*f"{line} --device cpu --tiny --json {path}".split()])
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_the_default_is_told_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "wan14b --steps 10")
    steps, summary = found["steps"], found["summary"]
    assert [row["sparse"] + row["dense"] for row in steps] == [4] * 10, "two layers, two calls for guidance"
    assert (steps[0]["sparse"], steps[0]["why dense"]) == (0, "4 step 1 of 1 dense warm-up steps")
    assert [len(found[name]["seconds"]) for name in ("inductor", "svg_ear, compiling")] == [2, 3]
    assert len(summary["difference"]) == 2
    assert summary["difference"][0] == 0, "the same bits after a dense step"
    checks = list(summary["checks"].values())
    assert checks[:2] == [True, True], "times of a toy are not checked"
    printed = capsys.readouterr().out
    assert "calls of rewritten sites: " in printed
    assert "steps: " in printed


BRIEF = "--steps 2 --dense-steps-timed 1 --warm-up 1 --layers 1"


def test_every_block_computed_differs_by_rounding_only(tmp_path: Path) -> None:
    exact, sparse = (results(tmp_path, f"wan1b {BRIEF} --density {d}") for d in (1, 0.3))
    for found, density in ((exact, 1), (sparse, 0.3)):
        assert [(row["sparse"], row["density"]) for row in found["steps"]] == [(2, density)] * 2
    for near, far in zip(exact["summary"]["difference"], sparse["summary"]["difference"], strict=True):
        assert near < far / 1000


def test_hunyuan_has_its_mask_and_one_call_a_step(tmp_path: Path) -> None:
    found = results(tmp_path, f"hunyuan {BRIEF} --density .3")
    assert [row["sparse"] for row in found["steps"]] == [3] * 2, "a double block and two single ones"
    sites = [site for graph in found["report"]["graphs"] for site in graph["sites"] if site["rewritten"]]
    assert sites
    assert all(site["mask"].startswith("key padding") for site in sites)


@pytest.mark.parametrize(
    "model", ["wan_i2v", "wan22", "wan5b", "hunyuan15", "cogvideox", "ltx2", "minimax_h3"]
)
def test_other_pipelines_run_sparse_in_every_step(model: str, tmp_path: Path) -> None:
    found = results(tmp_path, f"{model} --steps 4 --dense-steps-timed 1 --warm-up 1 --layers 1 --density .3")
    assert [row["dense"] for row in found["steps"]] == [0] * 4
    assert all(row["sparse"] for row in found["steps"])
    assert 0 < found["summary"]["difference"][0] < 0.1


def test_another_speed_up_beside(tmp_path: Path) -> None:
    line = f"wan1b {BRIEF} --density .3 --layers 2 --with cache --steps 3 --dense-steps-timed 3"
    summary = results(tmp_path, line)["summary"]
    assert summary["recompiles, Inductor"] > 0, "the cache is there: it asks between blocks whether they run"
    assert summary["recompiles, svg_ear"] <= summary["recompiles, Inductor"] + 1
    assert summary["checks"]["latents are finite"]
