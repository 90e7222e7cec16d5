"""Two processes on a CPU, with gloo: diffusers' Ulysses attention gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

Figures = dict[str, Any]
GRID = (3, 16, 16)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    """By rank, what two_ranks.py found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SVG_EAR")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["wan whole 1.0", "hunyuan_video fullgraph 1.0"])
def test_density_one_equals_one_process(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["off"] < 1e-6
        assert rank[name]["sparse_calls"] == 2
        assert rank[name]["dense_calls"] == {}


@pytest.mark.parametrize("name", ["wan regional 0.3", "hunyuan_video fullgraph 0.3"])
def test_equals_the_joint_softmax_of_its_plans(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert found["off"] < 1e-6
        assert found["off_if_dropped"] > 1e-5, "dropping would be seen"
        assert found["skips"]
        assert (found["plans"], found["heads"]) == (2, {1}), "a share of the heads in each layer"
        assert found["cubes"], "over the grid of the whole video"
        assert found["text_exact"]
        assert found["grids"].count(GRID) == 2, "of the graphs of both blocks"


def test_a_rank_that_fails_is_dense_alone(ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank fails"] for rank in ranks)
    assert (sparse["fallbacks"], dense["fallbacks"]) == (0, 2)
    assert 1e-6 < sparse["off"] == dense["off"] < 0.5, "one head of two is sparse"


def test_a_rank_that_cannot_rewrite_compiles_the_graph_as_it_is(ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank cannot rewrite"] for rank in ranks)
    assert (sparse["sparse_calls"], dense["sparse_calls"]) == (2, 0)
    assert 1e-6 < sparse["off"] == dense["off"] < 0.5
