"""Attention in graphs inside of a graph: written out in its place where that is the same, else named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Backend, Captured, Knobs, fresh_dynamo
from models.graphs import heads, tokens, video
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Region = Callable[[nn.Module, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.to_q(x))
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x)


class Shared(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x)


class Model(nn.Module):
    def __init__(self, region: Region, block: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.region = region

    def forward(self, clip: Tensor) -> Tensor:
        x = tokens(clip)
        for block in self.blocks:
            x = self.region(block, x)
        return x


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


def twice(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(checkpointed, block, x, use_reentrant=False)  # type: ignore[no-any-return]


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)  # type: ignore[no-any-return]


def conditional(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: block(y), lambda y: y + 1, (x,))


def compiled(model: nn.Module, clip: Tensor, gradients: bool = False, **how: Any) -> tuple[Captured, Tensor]:
    backend = Backend(Knobs(), rewrites=True)
    with fresh_dynamo(), torch.set_grad_enabled(gradients):
        out = torch.compile(model, backend=backend, fullgraph=True, **how)(clip)
    return backend.captured[0], out


@pytest.mark.parametrize(
    ("region", "block", "dynamic"),
    [
        (checkpointed, Block, None),
        (checkpointed, Block, True),
        (twice, Block, None),
        (plain, Shared, None),
    ],
)
def test_regions_that_just_run(region: Region, block: type[nn.Module], dynamic: bool | None) -> None:
    clip = video()
    graph, out = compiled(Model(region, block), clip, dynamic=dynamic)
    assert [site.verdict.reason.name for site in graph.sites] == ["REWRITTEN"] * 2
    assert [site.layout.grid_hint for site in graph.sites] == [(3, 4, 6)] * 2
    assert graph.others == ()
    ops = [node for node in graph.gm.graph.nodes if "svg_ear" in str(node.target)]
    assert len(ops) == 2
    torch.testing.assert_close(out, Model(plain)(clip), atol=1e-5, rtol=1e-4)


def test_the_modules_of_a_checkpoint_are_known() -> None:
    graph, _ = compiled(Model(checkpointed), video())
    assert [site.module_path for site in graph.sites] == ["blocks.0.attn1", "blocks.1.attn1"]


@pytest.mark.parametrize(
    ("region", "gradients", "other"),
    [
        (
            conditional,
            False,
            "attention inside of cond in blocks.*.attn1 (only attention outside of control flow operations is "
            "rewritten)",
        ),
        (
            checkpointed,
            True,
            "attention inside of activation checkpointing in blocks.*.attn1 (gradients are required: call the model "
            "under torch.no_grad() or torch.inference_mode())",
        ),
    ],
)
def test_what_stays_is_named(region: Region, gradients: bool, other: str) -> None:
    clip = video()
    graph, out = compiled(Model(region), clip, gradients)
    assert graph.sites == []
    assert graph.others[0] == other
    assert "outside of the graphs" not in str(graph.others)
    torch.testing.assert_close(out, Model(region)(clip), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_without_attention_stays() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    graph, _ = compiled(Model(checkpointed, Linear), video())
    names = [str(node.target) for node in graph.gm.graph.nodes]
    assert sum("checkpoint" in name for name in names) == 2
