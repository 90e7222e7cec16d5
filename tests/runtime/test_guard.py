"""The guard against inputs made to fool the routing: it fires where the error is large, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import svg_ear_compile.kernels.ops  # noqa: F401 - registers the ops
from svg_ear_compile.kernels import context, reference
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.precedence import resolve
from svg_ear_compile.runtime.density import LAG, CallLog, Controller
from svg_ear_compile.runtime.layers import Layer
from svg_ear_compile.runtime.readback import Sums

L, D, HEADS, STEPS, SITE = 512, 32, 2, 12, 0
GRID = [4, 8, 16]
MAX_ERROR = 0.1
QKV = tuple[Tensor, Tensor, Tensor]


def noise(step: int) -> QKV:
    random = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(1, L, HEADS, D, generator=random).transpose(1, 2) for _ in range(3))
    return q, k, v


def smooth(step: int) -> QKV:
    """Neighbours in the frame grid are alike: what blocks are made for."""
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in GRID), indexing="ij")
    place = torch.stack([axis.flatten() for axis in axes], -1)
    random = torch.Generator().manual_seed(7)
    waves = torch.randn(3, D, generator=random)
    x = torch.sin(place @ waves + 0.1 * step).expand(1, HEADS, L, D)
    return 0.3 * x, x, x


def no_structure(step: int) -> QKV:
    """Every query attends to a handful of keys, anywhere: no block is like its centroid."""
    q, k, v = noise(step)
    return 4 * q, k, v


def needles(step: int) -> QKV:
    """Each query has one key of its own, at a random place, with nearly all of its mass."""
    q, k, v = noise(step)
    random = torch.Generator().manual_seed(100 + step)
    q = 2.5 * torch.nn.functional.normalize(k, dim=-1)[:, :, torch.randperm(L, generator=random)] * D**0.5
    return q, torch.nn.functional.normalize(k, dim=-1) * D**0.5, v


def one_token(step: int) -> QKV:
    """One key has all the mass of all queries."""
    q, k, v = noise(step)
    q = q + 3
    k = k.clone()
    k[:, :, 300] = 6
    return q, k, v


def sink(step: int) -> QKV:
    """Half of all mass lies on the first tokens; the rest has no structure."""
    q, k, v = noise(step)
    q, k, v = q.clone(), k.clone(), v.clone()
    q[..., 0], k[..., 0] = 4, 0
    k[:, :, :4, 0] = 9
    v[:, :, :4] *= 0.01
    return q, k, v


def generation(inputs: Callable[[int], QKV], **options: float) -> tuple[Layer, Controller, dict[int, float]]:
    """One layer over all steps: what is kept for it, and the true errors of its sparse steps."""
    settings = resolve({"measure_every": 1, **options}, {}).settings
    controller, layer, errors = Controller(settings, can_split=True), Layer(0), {}
    for step in range(STEPS):
        controller.begin(step, 0, STEPS)
        decision = controller.decide(layer, 0)
        call = context.RunContext(context.Decisions({SITE: decision}, strict=True))
        qkv = inputs(step)
        with context.active(call):
            out = torch.ops.svg_ear.attention(*qkv, None, *SiteConstants(
                None, 0, False, GRID, "auto", "output_error", True, 0.2, 0, SITE
            ))  # fmt: skip
        exact = reference.dense(*qkv)
        error = ((out - exact).norm() / exact.norm()).item()
        if decision.dense:
            assert error < 1e-5
        else:
            errors[step] = error
        sums = call.results.measured.get(SITE)
        controller.ran(layer, CallLog(SITE, 0, 0, 0, step, decision, None if sums is None else Sums(sums)))
    return layer, controller, errors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ADVERSARIES = [no_structure, needles, one_token, sink]


@pytest.mark.parametrize("inputs", [smooth, *ADVERSARIES])
def test_it_fires_where_the_error_is_too_large(inputs: Callable[[int], QKV]) -> None:
    layer, _, errors = generation(inputs, density=0.2, max_error=MAX_ERROR)
    assert (layer.guarded is not None) == (max(errors.values()) > MAX_ERROR)
    if layer.guarded is not None:
        assert layer.guarded == pytest.approx(errors[0], rel=0.3), "a sample of its rows tells"
        assert set(errors) == set(range(LAG)), "dense from the first step that can know"


def test_of_the_four_the_unstructured_ones_are_hard() -> None:
    """So that the test above has seen both."""
    fired = [
        generation(f, density=0.2, max_error=MAX_ERROR)[0].guarded is not None for f in (smooth, *ADVERSARIES)
    ]
    assert fired == [False, True, True, False, True]


@pytest.mark.parametrize("inputs", [smooth, *ADVERSARIES])
def test_with_a_target_later_steps_meet_it_or_are_dense(inputs: Callable[[int], QKV]) -> None:
    target = 0.05
    layer, controller, errors = generation(inputs, target_error=target)
    later = [error for step, error in errors.items() if step > LAG]
    if (
        inputs is one_token
    ):  # the density that has room for its block is enough, one below is far from it: guarded
        assert layer.boost > 1 or layer.guarded is not None
    else:
        assert all(error <= 2 * target for error in later)
    if inputs is smooth:
        assert len(errors) == STEPS
        assert controller.steering is not None
        assert controller.steering.density < 0.2, "easy, and cheap"
