"""Every attention of every model gets the right verdict: verdicts.txt is the specification (golden.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from models import golden
from models.capture import Backend, Captured, Knobs, capture, described, fresh_dynamo
from models.matrix import PAGE, page
from models.tiny import BUILDERS, build

from svg_ear_compile.passes.classify import classify
from svg_ear_compile.passes.site import Site

F, H, W = golden.SIZE
GOLDEN = golden.read()
FAST = {
    *((name, "whole") for name in ("wan", "cogvideox", "hunyuan_video", "ltx", "latte", "flux", "llama", "helios")),
    ("wan", "regional"), ("hunyuan_video", "regional"), ("skyreels_v2_df", "whole"), ("minimax_h3", "whole"),
}  # fmt: skip
"""One of each kind: alone, text first or last, masks of each form, one frame, no frames, no video, causal, packed."""


@pytest.mark.parametrize(
    ("name", "way"),
    [key if key in FAST else pytest.param(*key, marks=pytest.mark.slow) for key in GOLDEN],
)
def test_models(name: str, way: str) -> None:
    assert golden.verdicts(name, way) == GOLDEN[name, way], "if this is meant: python tests/models/golden.py"


def test_all_models_are_there() -> None:
    assert list(GOLDEN) == [(b.__name__, way) for b in BUILDERS for way in golden.ways(b.__name__)]


def test_the_page_of_models_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python tests/models/golden.py"


def without_masks(lines: Sequence[str]) -> list[str]:
    return [line.partition(" | ")[0] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "ltx"])
def test_dynamic_shapes_change_no_verdict(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(F, H, W), dynamic=True)
    assert without_masks(golden.lines(backend)) == without_masks(GOLDEN[name, "whole"])
    lengths = [site.q_len for site in backend.sites if site.verdict.rewrite]
    assert all(isinstance(length, str) for length in lengths), "the graph is dynamic, and the site says so"


@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuan_video", marks=pytest.mark.slow)])
def test_dynamic_blocks(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(F, H, W), regional=True, dynamic=True)
    assert without_masks(golden.lines(backend)) == without_masks(GOLDEN[name, "regional"])


@pytest.mark.parametrize(
    "name",
    ["wan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ltx", "hunyuan_video", "kandinsky5"))],
)
def test_offloaded_blocks(name: str) -> None:
    from diffusers.hooks import apply_group_offloading

    model, arguments = build(name)
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    backend = Backend()
    with fresh_dynamo():
        model.compile_repeated_blocks(backend=backend)
        model(**arguments(F, H, W))
    assert golden.lines(backend)[1:] == GOLDEN[name, "regional"][1:]


def test_one_frame_is_no_video() -> None:
    model, arguments = build("wan")
    assert described(capture(model, arguments(1, H, W)).sites[0]) == "blocks.0.attn1 self NOT_VIDEO 1x4x6"


def test_text_as_long_as_the_video_is_still_cross_attention() -> None:
    _, arguments = build("wan")
    call = arguments(F, H, W) | {"encoder_hidden_states": torch.randn(1, F * H * W, 16)}
    for regional in (False, True):
        first, second = capture(build("wan")[0], call, regional=regional).sites[:2]
        assert (first.q_len, first.k_len, second.q_len, second.k_len) == (72, 72, 72, 72)
        assert (first.kind, second.kind) == ("self", "cross")


@cache
def graph(name: str, frames: int = F) -> Captured:
    """The graph of a whole model."""
    model, arguments = build(name)
    return capture(model, arguments(frames, H, W)).captured[0]


def sites(graph: Captured, **knobs: Any) -> list[Site]:
    return classify(graph.gm, Knobs(**knobs), graph.example_inputs)


def test_a_short_video_stays_dense() -> None:
    verdict = sites(graph("wan"), min_tokens=73)[0].verdict
    assert (verdict.reason.name, verdict.detail) == ("TOO_FEW_TOKENS", "72 of at least 73")


def test_text_does_not_count_as_video_tokens() -> None:
    assert not sites(graph("cogvideox"), min_tokens=73)[0].verdict.rewrite


@pytest.mark.parametrize(
    ("pattern", "rewritten"),
    [
        ("single_transformer_blocks.*", ["single_transformer_blocks.0.attn"]),
        ("*.attn", [0, 0]),
        ("attn1", []),
    ],
)
def test_sites_names_modules(pattern: str, rewritten: list[object]) -> None:
    found = [site.module_path for site in sites(graph("flux", 1), sites=(pattern,)) if site.verdict.rewrite]
    assert len(found) == len(rewritten)
    assert rewritten == found or 0 in rewritten


def test_sites_cannot_make_cross_attention_sparse() -> None:
    assert [site.verdict.rewrite for site in sites(graph("wan"), sites=("*",))] == [True, False, True, False]


def test_training_stays_dense() -> None:
    model, arguments = build("wan")
    torch._dynamo.reset()
    backend = Backend()
    torch.compile(model, backend=backend)(**arguments(F, H, W))
    torch._dynamo.reset()
    assert [site.verdict.reason.name for site in backend.sites] == ["GRAD", "CROSS"] * 2
