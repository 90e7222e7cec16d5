"""Two processes on a CPU, with gloo: diffusers' Ulysses attention gives what one process gives."""

from __future__ import annotations

import pytest
from parallel.worlds import Figures, two_processes

GRID = (3, 16, 16)
QUICK = ("wan regional 0.3", "spread")
MORE = (
    "wan whole 1.0", "hunyuan_video fullgraph 0.3", "hunyuan_video fullgraph 1.0",
    "minimax_h3 whole 1.0", "minimax_h3 regional 1.0", "minimax_h3 regional 0.3",
    "wan FSDP2 1.0", "one rank fails", "one rank cannot rewrite",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    """By rank, what two_ranks.py found in its QUICK runs."""
    return two_processes(tmp_path_factory.mktemp("ranks"), "cpu", *QUICK)


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    """The same of MORE."""
    return two_processes(tmp_path_factory.mktemp("more_ranks"), "cpu", *MORE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MORE if name.endswith(" 1.0") and "FSDP" not in name])
def test_density_one_equals_one_process(more_ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in more_ranks:
        assert rank[name]["off"] < 1e-6
        assert rank[name]["sparse_calls"] == 2
        assert rank[name]["dense_calls"] == {}


def test_equals_the_joint_softmax_of_its_plans(ranks: list[dict[str, Figures]]) -> None:
    check_joint_softmax(ranks, "wan regional 0.3")


@pytest.mark.slow
def test_text_in_the_same_sequence(more_ranks: list[dict[str, Figures]]) -> None:
    check_joint_softmax(more_ranks, "hunyuan_video fullgraph 0.3")


def check_joint_softmax(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert found["off"] < 1e-6
        assert found["off_if_dropped"] > 1e-5, "dropping would be seen"
        assert found["skips"]
        assert (found["plans"], found["heads"]) == (2, {1}), "a share of the heads in each layer"
        assert found["cubes"], "over the grid of the whole video"
        assert found["text_exact"]
        assert found["grids"].count(GRID) == 2, "of the graphs of both blocks"


@pytest.mark.slow
def test_a_packed_sequence(more_ranks: list[dict[str, Figures]]) -> None:
    for rank in more_ranks:
        found = rank["minimax_h3 regional 0.3"]
        assert found["off"] < 1e-6
        assert found["off_if_dropped"] > 1e-3
        assert (found["plans"], found["heads"], found["skips"]) == (2, {1}, True)


@pytest.mark.slow
def test_fully_sharded_weights(more_ranks: list[dict[str, Figures]]) -> None:
    for rank in more_ranks:
        found = rank["wan FSDP2 1.0"]
        assert found["off"] < 1e-6
        assert found["sparse_calls"] == 2


@pytest.mark.slow
def test_a_rank_that_fails_is_dense_alone(more_ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank fails"] for rank in more_ranks)
    assert (sparse["fallbacks"], dense["fallbacks"]) == (0, 2)
    assert 1e-6 < sparse["off"] == dense["off"] < 0.5, "one head of two is sparse"


@pytest.mark.slow
def test_a_rank_that_cannot_rewrite_compiles_the_graph_as_it_is(more_ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank cannot rewrite"] for rank in more_ranks)
    assert (sparse["sparse_calls"], dense["sparse_calls"]) == (2, 0)
    assert 1e-6 < sparse["off"] == dense["off"] < 0.5


def test_the_spread_over_ranks(ranks: list[dict[str, Figures]]) -> None:
    """One of them prints it, and each has a path of its own for a report."""
    first, second = (rank["spread"] for rank in ranks)
    head, _, *rows = first["said"].splitlines()
    assert head.split()[:3] == ["rank", "sparse", "calls"]
    assert [row.split()[:3] for row in rows] == [["0", "2", "0"], ["1", "2", "0"]]
    assert second["said"] == ""
    assert (first["path"], second["path"]) == ("out/report.html", "out/report.rank1.html")
