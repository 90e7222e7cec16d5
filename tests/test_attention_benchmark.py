"""What benchmarks/attention.py knows without a GPU: its presets, and which part of a call is clustering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmark import import_benchmark

from svg_ear_compile.kernels import context
from svg_ear_compile.kernels.blocks import cluster
from svg_ear_compile.kernels.plan import SparsePlan, empty_plan
from svg_ear_compile.precedence import resolve


def test_presets_are_what_a_user_would_set() -> None:
    found = {}
    for name, options in import_benchmark("attention").PRESETS.items():
        settings = resolve({**options, "density": 0.2}, {}).settings
        found[name] = (settings.order, settings.routing, settings.compensate)
    assert found == {
        "default": ("auto", "output_error", True),
        "cubes": ("cubes", "output_error", True),
        "dropped": ("cubes", "output_error", False),
        "splits": ("splits", "output_error", True),
        "kmeans": ("kmeans", "output_error", True),
        "first_order": ("cubes", "output_error", True),
        "svg_ear": ("kmeans", "svg_ear", True),
        "svg2": ("kmeans", "mass", False),
    }


def test_forms_are_those_of_the_default() -> None:
    benchmark = import_benchmark("attention")
    splits, terms = (benchmark.of_heads(share, 40) for share in benchmark.FORMS["default"])
    assert (sum(splits), sum(terms)) == (14, 32)
    assert terms == benchmark.of_heads(0.8, 40), "always the same"
    assert benchmark.of_heads(0.0, 40) == ()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("first_order", [False, True], ids=["centroids", "first order"])
def test_the_check_of_outputs_sees_what_is_missing(first_order: bool, masked: bool) -> None:
    benchmark, g = import_benchmark("attention"), torch.Generator().manual_seed(0)
    query, key, noise = torch.randn(3, 1, 2, 4 * 12 * 12, 16, generator=g)
    value = noise + key @ torch.randn(16, 16, generator=g)  # values go with their keys
    constants = (None, 0, False, [4, 12, 12], "cubes", "output_error", True, 0.3, 0, 0)
    mask = torch.arange(4 * 12 * 12).lt(4 * 12 * 12 - 30)[None, None, None] if masked else None
    plan = SparsePlan(*torch.ops.svg_ear.clustered_permute(query, key, value, mask, *constants))

    def error(of_output: bool) -> float:
        decision = context.SiteDecision(density=0.3, first_order=(of_output,) * 2)
        with context.active(context.RunContext(context.Decisions({0: decision}, strict=True))):
            out = torch.ops.svg_ear.attention(query, key, value, mask, *constants)
        found: float = benchmark.error_to_plan(out, query, plan, 16**-0.5, [0, 1], (first_order,) * 2)[1]
        return found

    assert error(first_order) < 1e-5
    assert error(not first_order) > benchmark.CHECK_ALL


@pytest.mark.parametrize("order", ["cubes", "kmeans"])
def test_clustering_is_watched_and_still_done(order: str) -> None:
    timing = import_benchmark("timing")
    real, g = cluster.make_blocks, torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 2, 4 * 6 * 6, 16, generator=g) for _ in range(3)]
    constants = (None, 0, False, [4, 6, 6], order, "output_error", True, 0.3, 0, 0)

    def call() -> torch.Tensor:
        with context.active(context.RunContext(context.Decisions(strict=True))):
            return torch.ops.svg_ear.attention(*qkv, None, *constants)

    seen: list[Any] = []

    def watch(make_blocks: Any) -> Any:
        seen.append(make_blocks())
        return seen[-1]

    alone = call()
    with timing.around_clustering(watch):
        assert torch.equal(call(), alone)
    assert len(seen) == 2, "queries and keys"
    assert all(isinstance(blocks, cluster.Blocks) for blocks, _ in seen)
    assert cluster.make_blocks is real


@pytest.mark.parametrize("clusters", [False, True])
def test_configurations_are_timed_on_a_plan(clusters: bool) -> None:
    key, value = torch.randn(2, 1, 2, 4 * 128 + 5, 16)
    plan = import_benchmark("attention_configs").made_up_plan(key, value, 0.3, clusters)
    expected = empty_plan(key, 0, "kmeans" if clusters else "cubes")
    assert [(x.shape, x.dtype) for x in plan] == [(x.shape, x.dtype) for x in expected]
    assert 0 < plan.kept_count.sum() < plan.bias.numel()
