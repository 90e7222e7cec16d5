"""A model that nobody told us of: cubes cut out by hand, a fused projection, a prompt in the same sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy import EAGER, calls, compiled

import svg_ear_compile
from svg_ear_compile.kernels import planning, reference
from svg_ear_compile.kernels.plan import SparsePlan

pytestmark = pytest.mark.usefixtures("fresh")
WIDTH, HEADS = 64, 2


class Fused(nn.Module):
    """One projection for queries, keys and values, normalised per head; text first in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH // HEADS)
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = self.attend(self.norm(q), self.norm(k), v)
        return self.out(out.permute(0, 2, 1, 3).reshape(batch, length, WIDTH))


class ClipDenoiser(nn.Module):
    """Cubes of 1 x 2 x 2 pixels cut out by hand, a prompt in front of them, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.layers = nn.ModuleList(Fused() for _ in range(2))

    def forward(self, clip: Tensor, prompt: Tensor) -> Tensor:
        batch, _, frames, height, width = clip.shape
        cut = clip.reshape(batch, 3, frames, height // 2, 2, width // 2, 2)
        x = self.embed(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
        x = torch.cat([prompt, x], dim=1)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)))
        y = self.unembed(x[:, prompt.shape[1] :])
        y = y.reshape(batch, frames, height // 2, width // 2, 3, 2, 2)
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(clip.shape)

    def stand_in(self, attend: Callable[..., Tensor]) -> None:
        for number, layer in enumerate(self.layers):
            layer.attend = lambda q, k, v, n=number: attend(n, q, k, v)


def arguments() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    clip = torch.randn(2, 3, 5, 18, 22, generator=random)
    return clip, torch.randn(2, 9, WIDTH, generator=random)


def model() -> ClipDenoiser:
    torch.manual_seed(0)
    return ClipDenoiser().eval()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[int, SparsePlan]:
    used: dict[int, SparsePlan] = {}
    make_plan = planning.make_plan

    def spy(*args: Any) -> SparsePlan:
        used[args[-1].site] = make_plan(*args)
        return used[args[-1].site]

    monkeypatch.setattr(planning, "make_plan", spy)
    return used


@pytest.mark.parametrize("dynamic", [False, True])
def test_rewritten_and_right_at_density_one(dynamic: bool) -> None:
    run = compiled(model(), {**EAGER, "density": 1.0}, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(run(*arguments()), model()(*arguments()), rtol=1e-4, atol=1e-5)
    sites = [site.decision for site in svg_ear_compile.report().sites]
    assert [(site.kind, site.num_text, site.grid) for site in sites] == [("joint", 9, (5, 9, 11))] * 2
    assert calls() == (2, {})


@pytest.mark.parametrize("merge", [True, False])
def test_right_at_a_third_of_the_blocks(merge: bool, plans: dict[int, SparsePlan]) -> None:
    run = compiled(model(), {**EAGER, "density": 0.3, "merge": merge, "first_order": False}, fullgraph=True)
    got = run(*arguments())
    assert not torch.allclose(got, model()(*arguments()), rtol=1e-4, atol=1e-5)
    truth = model()
    truth.stand_in(
        lambda site, q, k, v: reference.joint_softmax(
            q, reference.remade(plans[site], k, v), q.shape[-1] ** -0.5, torch.float32
        )
    )
    torch.testing.assert_close(got, truth(*arguments()), rtol=1e-4, atol=1e-5)
