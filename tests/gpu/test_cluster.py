"""Splits and k-means on a GPU: as good as in PyTorch, the same bits twice, no waiting, memory, times."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.blocks import splits
from svg_ear_compile.kernels.blocks import splits_torch as split_steps
from svg_ear_compile.kernels.dispatch import kernels_for
from svg_ear_compile.kernels.papers import kmeans
from svg_ear_compile.kernels.papers import kmeans_torch as kmeans_steps
from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from clustered import is_permutation, radius, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WAN_720P = (1, 40, 75_600, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CLUSTERS = {"query": 300, "key": 1000}


def strided(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B,H,N,D] on the GPU, laid out as a model's [B,N,H,D]."""
    return x.to("cuda", dtype).transpose(1, 2).contiguous().transpose(1, 2)


def of_a_video(shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """Tokens of a real size in bfloat16, in 200 clusters a head."""
    B, H, N, D = shape
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(B, N, H, D, device="cuda", generator=g, dtype=torch.bfloat16)
    centers = torch.randn(200, H, D, device="cuda", generator=g, dtype=torch.bfloat16)
    for b in range(B):
        x[b] += centers[torch.randint(0, 200, (N,), device="cuda", generator=g)]
    return x.transpose(1, 2)


def random_orders(heads: int, length: int) -> Tensor:
    return torch.rand(heads, length, device="cuda").argsort(-1).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_labels_are_nearest_in_double(dtype, head_dim):
    triton_kmeans = pytest.importorskip("svg_ear_compile.kernels.papers.kmeans_triton")
    x = strided(tokens(1, 3, 2000, head_dim), dtype)[0]
    centroids = tokens(1, 3, 301, head_dim, seed=1)[0].cuda()
    centroids[:, 200] = centroids[:, 1]
    valid = torch.rand(2000, device="cuda") < 0.8
    labels = triton_kmeans.assign(x, valid, centroids).long()
    assert (labels[:, ~valid] == 301).all()
    assert (labels != 200).all(), "the lowest index wins ties"
    labels = labels[:, valid]
    distance = torch.cdist(x[:, valid].double(), centroids.double()).square()
    excess = distance.gather(2, labels[..., None])[..., 0] / distance.amin(-1) - 1
    assert excess.max() < 1e-5
    same = labels == kmeans_steps.assign(x, None, centroids)[:, valid]
    assert same.float().mean() > 0.999
    assert torch.equal(labels, triton_kmeans.assign(x, None, centroids)[:, valid].long())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_means_of_clusters(device):
    """On both devices: from sums in float64."""
    steps = kernels_for(torch.empty(0, device=device)).kmeans
    random = torch.Generator().manual_seed(0)
    x, before = torch.randn(3, 500, 64, generator=random), torch.randn(3, 20, 64, generator=random)
    order, offsets = kmeans._by_label(torch.randint(0, 19, (3, 500), generator=random), 20)
    actual = steps.means(*(y.to(device) for y in (x, order, offsets, before))).cpu()
    for g in range(3):
        for c in range(20):
            members = order[g, offsets[g, c] : offsets[g, c + 1]]
            expected = x[g, members].double().mean(0).float() if len(members) else before[g, c]
            torch.testing.assert_close(actual[g, c], expected)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_kmeans_is_as_good_as_on_the_cpu(masked):
    x = tokens(2, 3, 1500, 64, clusters=40)
    valid = torch.rand(2, 1500, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    for dtype in DTYPES:
        spread = []
        for device in ("cpu", "cuda"):
            tokens_there = strided(x, dtype).to(device)
            seen = None if valid is None else valid.to(device)
            order, offsets, centroids = kmeans.kmeans(tokens_there, seen, 50, None, 0)
            assert is_permutation(order)
            count = torch.full((2,), 1500) if valid is None else valid.sum(-1)
            assert torch.equal(offsets[..., -1].cpu(), count[:, None].expand(2, 3))
            distance = torch.cdist(tokens_there.float(), centroids).amin(-1).square()
            spread.append((distance if seen is None else distance * seen[:, None]).mean().item())
        assert spread[1] == pytest.approx(spread[0], rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "head_dim", "block"), [(3001, 128, 64), (2500, 96, 128), (700, 64, 32)])
def test_a_level_of_splits(dtype, length, head_dim, block):
    """Directions and coordinates within rounding, halves exactly the reference's for the same coordinates."""
    triton_splits = pytest.importorskip("svg_ear_compile.kernels.blocks.splits_triton")
    x, order = strided(tokens(1, 3, length, head_dim), dtype)[0], random_orders(3, length)
    live = torch.tensor([length - 50], dtype=torch.int32, device="cuda")
    start = torch.linspace(-1, 1.5, head_dim, device="cuda")
    for segments in (1, 2, 8):
        found = triton_splits.directions(x, order, live, start, block, segments)
        expected = split_steps.directions(x, order, live, start, block, segments)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        along = triton_splits.project(x, order, live, expected, block)
        torch.testing.assert_close(
            along, split_steps.project(x, order, live, expected, block), atol=1e-4, rtol=1e-4
        )
        for values in (along, along.round(), torch.zeros_like(along)):
            halves = triton_splits.partition(values, order, block, segments)
            assert torch.equal(halves, split_steps.partition(values, order, block, segments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_splits_are_as_compact_as_on_the_cpu(dtype, masked):
    x = tokens(2, 3, 10_000, 128, clusters=40)
    valid = None
    if masked:
        valid = torch.rand(2, 10_000, generator=torch.Generator().manual_seed(0)) < 0.7
    found = []
    for device in ("cpu", "cuda"):
        seen = None if valid is None else valid.to(device)
        order = splits.splits(strided(x, dtype).to(device), seen, KEY_BLOCK).cpu()
        assert is_permutation(order)
        moved = x.gather(2, order[..., None].expand_as(x))
        found.append(radius(moved[:, :, :6400], KEY_BLOCK))
        if valid is not None:
            live = valid[:, None].expand(2, 3, -1).gather(2, order).int()
            assert (live.diff(dim=-1) <= 0).all(), "masked tokens come last"
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_not_numbers_stay_in_their_head():
    x = strided(tokens(1, 3, 3000, 128), torch.bfloat16)
    poisoned = x.clone()
    poisoned[0, 1, [7, 2000], 3] = math.nan
    for blocks in (lambda y: (splits.splits(y, None, 64),), lambda y: kmeans.kmeans(y, None, 50, None, 0)):
        clean, found = blocks(x), blocks(poisoned)
        assert is_permutation(found[0])
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(a[:, [0, 2]], b[:, [0, 2]])


def calls(x: Tensor, block: int, clusters: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Of one step: splits, and k-means carried on."""
    carried = kmeans.kmeans(x[:, :, :3000], None, clusters, None, 0)[2]
    return {
        "splits": lambda: (splits.splits(x, None, block),),
        "kmeans": lambda: kmeans.kmeans(x, None, clusters, carried, 0),
    }


@pytest.mark.parametrize("way", ["splits", "kmeans"])
def test_same_bits_no_waiting_and_cuda_graphs(way):
    x = of_a_video((2, 3, 9000, 128))
    call = calls(x, KEY_BLOCK, 300)[way]
    first = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    x.copy_(of_a_video((2, 3, 9000, 128), seed=1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(call(), recorded, strict=True))


@pytest.mark.parametrize("way", ["splits", "kmeans"])
def test_memory_at_wan_720p(way):
    """At most 0.5 GB beyond the tokens."""
    call = calls(of_a_video(WAN_720P), KEY_BLOCK, CLUSTERS["key"])[way]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = call()
    assert torch.cuda.max_memory_allocated() - before <= 0.5e9
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def milliseconds(call: Callable[[], object], runs: int = 5) -> float:
    """Median of some runs, after one."""
    call()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def test_times_at_wan_720p():
    """Prints medians (pytest -s): splits, and two iterations of k-means, of queries and of keys."""
    for name, block in (("query", QUERY_BLOCK), ("key", KEY_BLOCK)):
        x = of_a_video(WAN_720P)
        for way, call in calls(x, block, CLUSTERS[name]).items():
            print(f"{name} {way}: {milliseconds(call):.1f} ms")
