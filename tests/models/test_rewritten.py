"""A rewritten model at density 1 is the model: whole and by blocks, static and dynamic, three ops or one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from models.capture import Backend, Knobs, capture, compiled, fresh_dynamo
from models.golden import LARGER, ULYSSES, read
from models.tiny import build

SIZES = [(3, 4, 6), (3, 6, 4), (2, 4, 8)]
REWRITTEN = ["wan", "cogvideox", "hunyuan_video"]
SECTIONS = {
    key for key, lines in read().items() if key[1] != ULYSSES and any(" REWRITTEN" in line for line in lines)
}
REGIONAL = {name for name, way in SECTIONS if way == "regional"}
OTHERS = sorted({name for name, way in SECTIONS if way == "whole"} - set(REWRITTEN))


def check(
    name: str,
    sizes: Sequence[tuple[int, ...]],
    regional: bool,
    dynamic: bool | None = None,
    merge: bool = True,
    counted: bool = False,
) -> None:
    """counted: whether the number of graphs is compared, which takes as long again."""
    (model, arguments), (eager, _) = build(name), build(name)
    backend = Backend(Knobs(merge=merge), rewrites=True)
    calls = [arguments(*size) | {"return_dict": False} for size in sizes]
    with fresh_dynamo():
        run = compiled(model, backend, regional, dynamic)
        for call in calls:
            expected, got = eager(**call)[0], run(**call)[0]
            halved = any(site.verdict.rewrite and site.dtype == "bfloat16" for site in backend.sites)
            near = (1e-3 if halved else 2e-6) * expected.abs().max().item()  # sana_wm attends in bfloat16
            torch.testing.assert_close(got, expected, atol=near, rtol=1e-5)
    assert any(site.verdict.rewrite for site in backend.sites)
    if counted:
        untouched = capture(build(name)[0], *calls, regional=regional, dynamic=dynamic)
        assert len(backend.captured) == len(untouched.captured), "no recompilation that would not be anyway"


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("wan", True),
        pytest.param("cogvideox", None, marks=pytest.mark.slow),
        pytest.param("cogvideox", True, marks=pytest.mark.slow),
        pytest.param("hunyuan_video", None, marks=pytest.mark.slow),
        pytest.param("hunyuan_video", True, marks=pytest.mark.slow),
        pytest.param("wan", None, marks=pytest.mark.slow),
    ],
)
def test_whole(name: str, dynamic: bool | None) -> None:
    if name == "wan":
        check(name, SIZES, regional=False, dynamic=dynamic, counted=True)
    else:  # a second size is what may break
        check(name, SIZES[:2], regional=False, dynamic=dynamic)


@pytest.mark.parametrize(
    "dynamic", [pytest.param(None, id="automatic", marks=pytest.mark.slow), pytest.param(True, id="dynamic")]
)
@pytest.mark.parametrize("name", ["hunyuan_video", pytest.param("wan", marks=pytest.mark.slow)])
def test_block_by_block(name: str, dynamic: bool | None) -> None:
    sizes = SIZES[:2] if dynamic else SIZES
    check(name, sizes, regional=True, dynamic=dynamic, counted=dynamic is None)


@pytest.mark.parametrize(
    "name", ["hunyuan_video", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "cogvideox"))]
)
def test_three_ops(name: str) -> None:
    """Of dynamic sizes, which are the harder part."""
    check(name, SIZES[:1], regional=False, dynamic=True, merge=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str) -> None:
    check(name, [LARGER.get(name, SIZES[0])], regional=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGIONAL & set(OTHERS)))
def test_other_models_block_by_block(name: str) -> None:
    check(name, [LARGER.get(name, SIZES[0])], regional=True)


def test_batches() -> None:
    (model, arguments), (eager, _) = build("hunyuan_video"), build("hunyuan_video")
    with fresh_dynamo():
        run = compiled(model, Backend(rewrites=True))
        call = arguments(3, 4, 6, batch=2) | {"return_dict": False}
        torch.testing.assert_close(run(**call)[0], eager(**call)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_sdpa_would(dtype: torch.dtype) -> None:
    (model, arguments), (eager, _) = build("wan"), build("wan")
    backend = Backend(rewrites=True)
    with fresh_dynamo(), torch.autocast("cpu", dtype):
        call = arguments(3, 4, 6) | {"return_dict": False}
        got, expected = compiled(model, backend)(**call)[0], eager(**call)[0]
    assert [site.verdict.rewrite for site in backend.sites] == [True, False] * 2
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_sparse_is_not_dense() -> None:
    (model, arguments), (eager, _) = build("wan"), build("wan")
    with fresh_dynamo():
        run = compiled(model, Backend(Knobs(density=0.25), rewrites=True))
        call = arguments(3, 16, 16) | {"return_dict": False}
        got, expected = run(**call)[0], eager(**call)[0]
    difference = ((got - expected).norm() / expected.norm()).item()
    assert 1e-6 < difference < 0.05, "blocks were really skipped, and compensated"
