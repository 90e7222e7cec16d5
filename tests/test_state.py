"""Layers are known by their Parameter objects; what is kept for them goes away with them."""

from __future__ import annotations

import gc

import torch
from torch import nn

from svg_ear_compile.state import MAX_BRANCHES, Layers


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def centroids(value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2,), value), torch.full((2,), value)


def test_layers_are_numbered_in_order_of_appearance_per_model() -> None:
    layers = Layers()
    first, second = [parameter() for _ in range(3)], [parameter() for _ in range(2)]
    a = layers.model_of(first[0])
    numbers = [layers.layer(p, a).number for p in first + first]
    b = layers.model_of(second[0])
    assert b is not a
    assert numbers == [0, 1, 2] * 2
    assert [layers.layer(p, b).number for p in second] == [0, 1]
    assert layers.model_of(first[2]) is a
    assert layers.layer(first[1], b).model is a, "a layer stays with its model, whoever runs"


def test_identity_survives_an_exchange_of_data() -> None:
    layers, p = Layers(), parameter()
    layer = layers.layer(p, layers.model_of(p))
    p.data = torch.ones(1)
    assert layers.layer(p, layers.new_model()) is layer


def test_nothing_outlives_the_parameter() -> None:
    layers, p = Layers(), parameter()
    layers.keep(layers.layer(p, layers.model_of(p)), 0, "stamp", centroids())
    assert len(layers) == 1
    del p
    gc.collect()
    assert len(layers) == 0


def test_centroids_per_branch_and_stamp() -> None:
    layers, p = Layers(), parameter()
    layer = layers.layer(p, layers.model_of(p))
    for branch in (0, 1):
        layers.keep(layer, branch, "a", centroids(branch))
    kept = layers.carried(layer, 1, "a")
    assert kept is not None
    assert kept[0][0] == 1
    assert layers.carried(layer, 0, "b") is None, "another generation, shape or device"
    assert layers.carried(layer, 0, "a") is None, "and then it is gone"


def test_branches_are_bounded() -> None:
    layers, p = Layers(), parameter()
    layer = layers.layer(p, layers.model_of(p))
    for branch in range(3 * MAX_BRANCHES):
        layers.keep(layer, branch, "a", centroids())
    assert list(layer.carried) == list(range(2 * MAX_BRANCHES, 3 * MAX_BRANCHES))


def test_clear() -> None:
    layers, p = Layers(), parameter()
    layer = layers.layer(p, layers.model_of(p))
    layers.clear()
    assert layers.layer(p, layers.model_of(p)) is not layer
