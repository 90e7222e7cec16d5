"""Two GPUs with NCCL: diffusers' Ulysses attention gives what one GPU gives."""

from __future__ import annotations

import pytest
import torch
from parallel.worlds import Figures, two_processes

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    return two_processes(tmp_path_factory.mktemp("ranks"), "cuda")


@pytest.mark.parametrize("name", ["wan whole 1.0", "hunyuan_video fullgraph 1.0"])
def test_density_one_equals_one_gpu(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["off"] <= 2 * rank[name]["rounding"]
        assert (rank[name]["sparse_calls"], rank[name]["dense_calls"]) == (2, {})


@pytest.mark.parametrize("name", ["wan regional 0.3", "hunyuan_video fullgraph 0.3"])
def test_equals_the_joint_softmax_of_its_plans(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert found["off"] <= 2 * found["rounding"]
        assert (found["skips"], found["cubes"], found["text_exact"]) == (True, True, True)


def test_a_rank_that_fails_is_dense_alone(ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank fails"] for rank in ranks)
    assert (sparse["fallbacks"], dense["fallbacks"]) == (0, 2)
    assert sparse["off"] == dense["off"]
