"""Splits and k-means in Triton under Triton's interpreter, without a GPU, against the PyTorch ones.

See test_attention.py; float16 is right under the interpreter, bfloat16 is not.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from clustered import is_permutation, radius, tokens
from torch import Tensor

from svg_ear_compile.kernels.blocks import splits
from svg_ear_compile.kernels.blocks import splits_torch as split_steps
from svg_ear_compile.kernels.blocks import splits_triton as triton_splits
from svg_ear_compile.kernels.papers import kmeans
from svg_ear_compile.kernels.papers import kmeans_torch as kmeans_steps
from svg_ear_compile.kernels.papers import kmeans_triton as triton_kmeans
from svg_ear_compile.kernels.triton_configs import Config

SMALL_TILES = Config(32, 0, 16, 4, 1, 1)


def heads(*shape: int, seed: int = 0) -> Tensor:
    """Tokens [G,N,D], strided as a model's [N,G,D]."""
    return tokens(1, *shape, seed=seed)[0].transpose(0, 1).contiguous().transpose(0, 1)


def random_orders(heads: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(length, generator=g) for _ in range(heads)]).int()


def start(head_dim: int) -> Tensor:
    return torch.linspace(-1, 1.5, head_dim)


def number(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32)


@pytest.mark.parametrize(
    ("length", "head_dim", "block", "live"),
    [(700, 24, 64, 700), (515, 96, 64, 300), (300, 128, 32, 299), (40, 64, 64, 40), (300, 16, 128, 0)],
)
def test_directions_and_coordinates(length, head_dim, block, live):
    x, order = heads(2, length, head_dim), random_orders(2, length)
    x[:, order[0, live:].long()] = math.nan  # masked, in head 0 at least
    for segments in (1, 2, 8):
        arguments = x[:1], order[:1], number(live)
        expected = split_steps.directions(*arguments, start(head_dim), block, segments)
        actual = triton_splits.directions(*arguments, start(head_dim), block, segments)
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        along = triton_splits.project(*arguments, expected, block)
        torch.testing.assert_close(
            along, split_steps.project(*arguments, expected, block), atol=1e-5, rtol=1e-5
        )
        assert (along[:, live:] == math.inf).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_coordinates_of_not_numbers_are_numbers(bad):
    x, order, live = heads(2, 300, 16), random_orders(2, 300), number(300)
    x[1, 7, 3] = bad
    found = triton_splits.directions(x, order, live, start(16), 64, 2)
    along = triton_splits.project(x, order, live, found, 64)
    assert along.isfinite().all()
    clean = split_steps.directions(x[:1], order[:1], live, start(16), 64, 2)
    torch.testing.assert_close(found[:1], clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "tile"),
    [
        ("ties", None),
        ("zeros", None),
        ("masked", 64),
        *(pytest.param(v, None, marks=pytest.mark.slow) for v in ("floats", "equal", "masked")),
        pytest.param("ties", 64, marks=pytest.mark.slow),
    ],
)
def test_halves(values, tile, monkeypatch):
    """Exactly the reference's, whichever coordinates there are."""
    if tile is not None:
        monkeypatch.setattr(triton_splits, "_PARTITIONS", ((tile, 1),))
    g = torch.Generator().manual_seed(2)
    for length, block in ((270, 32), (129, 128)):
        scale = 10.0 ** torch.randint(-30, 30, (length,), generator=g)
        along = torch.randn(2, length, generator=g) * scale
        if values == "ties":
            along = torch.randint(-3, 3, (2, length), generator=g).float()
        elif values == "equal":
            along = torch.full((2, length), -7.5)
        elif values == "zeros":
            along = torch.where(torch.rand(2, length, generator=g) < 0.5, 0.0, -0.0)
        elif values == "masked":
            along[:, length * 2 // 3 :] = math.inf
            along[:, : length // 3] = torch.finfo(torch.float32).max
        order = random_orders(2, length)
        for segments in (1, 4):
            expected = split_steps.partition(along, order, block, segments)
            actual = triton_splits.partition(along, order, block, segments)
            assert is_permutation(actual)
            assert torch.equal(actual, expected)
            if values in ("equal", "zeros"):
                assert torch.equal(actual, order), "among equals the order stays"


@pytest.mark.parametrize(
    "masked", [pytest.param(False, id="all", marks=pytest.mark.slow), pytest.param(True, id="masked")]
)
def test_splits(monkeypatch, masked):
    x = tokens(2, 2, 300, 32).transpose(1, 2).contiguous().transpose(1, 2)
    valid = None
    if masked:
        valid = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.8
    expected = splits.splits(x, valid, 64)
    monkeypatch.setattr(splits, "kernels_for", lambda x: SimpleNamespace(splits=triton_splits))
    actual = splits.splits(x, valid, 64)
    assert is_permutation(actual)
    # Rounding may send a token to the other side, and what follows another way: not where it matters.
    assert (actual == expected).float().mean() > 0.9
    moved = [x.gather(2, order[..., None].expand_as(x))[:, :, :192] for order in (actual, expected)]
    assert radius(moved[0], 64) == pytest.approx(radius(moved[1], 64), rel=1e-3)
    if masked:
        live = valid[:, None].expand(2, 2, -1).gather(2, actual).int()
        assert (live.diff(dim=-1) <= 0).all(), "masked tokens come last"
    poisoned = x.clone()
    poisoned[1, 1, [3, 200]] = math.nan
    again = splits.splits(poisoned, valid, 64)
    assert is_permutation(again)
    others = torch.tensor([[True, True], [True, False]])
    assert torch.equal(again[others], actual[others])


@pytest.mark.parametrize(
    ("length", "head_dim", "clusters"), [(300, 24, 37), (130, 96, 5), (65, 64, 100), (200, 128, 16)]
)
def test_labels(length, head_dim, clusters):
    x, g = heads(2, length, head_dim), torch.Generator().manual_seed(3)
    x[1, 11, 3] = math.nan
    x[1, 12, 3] = math.inf
    centroids = torch.randn(2, clusters, head_dim, generator=g)
    centroids[:, clusters // 2] = centroids[:, 1]  # the lower index wins
    centroids[0, 2, 0] = math.nan
    for valid in (None, torch.rand(length, generator=g) < 0.8):
        expected = kmeans_steps.assign(x, valid, centroids)
        for config in (None, SMALL_TILES, SMALL_TILES._replace(tma=True)):
            actual = triton_kmeans.assign(x, valid, centroids, config)
            assert actual.dtype == torch.int16
            assert (expected != clusters // 2).all()
            assert torch.equal(actual.long(), expected)


def test_labels_of_half_precision_are_nearest_in_double():
    """Two numbers for a centroid: within 1e-6 of the least distance. Its rounding alone is not."""
    x, centroids = heads(2, 300, 64).half(), heads(2, 200, 64, seed=5)
    label = triton_kmeans.assign(x, None, centroids).long()
    distance = torch.cdist(x.double(), centroids.double()).square()

    def excess(label: Tensor) -> float:
        return (distance.gather(2, label[..., None])[..., 0] / distance.amin(-1) - 1).max().item()

    assert excess(label) < 1e-6
    assert excess(kmeans_steps.assign(x, None, centroids.half().float())) > 1e-5


def test_means():
    x, g = heads(2, 500, 48), torch.Generator().manual_seed(6)
    order, offsets = kmeans._by_label(torch.randint(0, 20, (2, 500), generator=g).short(), 21)
    before = torch.randn(2, 21, 48, generator=g)
    actual, expected = (s.means(x, order, offsets, before) for s in (triton_kmeans, kmeans_steps))
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[:, 20], before[:, 20]), "an empty cluster stays where it was"


@pytest.mark.parametrize(
    "masked", [pytest.param(False, id="all", marks=pytest.mark.slow), pytest.param(True, id="masked")]
)
def test_kmeans(monkeypatch, masked):
    x = tokens(2, 2, 300, 32).transpose(1, 2).contiguous().transpose(1, 2)
    x[1, 1, 5] = math.nan
    valid = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    monkeypatch.setattr(kmeans, "FIRST_ITERATIONS", 4)
    expected = kmeans.kmeans(x, valid, 23, None, 0)
    expected += kmeans.kmeans(x, valid, 23, expected[2], 0)
    monkeypatch.setattr(kmeans, "kernels_for", lambda x: SimpleNamespace(kmeans=triton_kmeans))
    actual = kmeans.kmeans(x, valid, 23, None, 0)
    actual += kmeans.kmeans(x, valid, 23, actual[2], 0)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    assert is_permutation(actual[0])
