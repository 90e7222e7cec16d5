"""Every attention of every model gets the right verdict: the table is the specification.

min_tokens is 1, so what stays dense does so for what it is. A line: path, kind, reason, text, grid.
"""

from __future__ import annotations

import pytest
import torch
from models.capture import Backend, Knobs, capture, described
from models.tiny import TEXT, build

F, H, W = 3, 4, 6

WHOLE = {
    "wan": [
        "blocks.0.attn1 self REWRITTEN 3x4x6",
        "blocks.0.attn2 cross CROSS 3x4x6",
        "blocks.1.attn1 self REWRITTEN 3x4x6",
        "blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "wan_i2v": [
        "blocks.0.attn1 self REWRITTEN 3x4x6",
        "blocks.0.attn2 cross CROSS 3x4x6",
        "blocks.0.attn2 cross CROSS 3x4x6",
        "blocks.1.attn1 self REWRITTEN 3x4x6",
        "blocks.1.attn2 cross CROSS 3x4x6",
        "blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "cogvideox": [
        "transformer_blocks.0.attn1 joint REWRITTEN text=7 first 3x4x6",
        "transformer_blocks.1.attn1 joint REWRITTEN text=7 first 3x4x6",
    ],
    "hunyuan_video": [
        "context_embedder.token_refiner.refiner_blocks.0.attn self TEXT",
        "transformer_blocks.0.attn joint REWRITTEN text=7 last 3x4x6",
        "single_transformer_blocks.0.attn joint REWRITTEN text=7 last 3x4x6",
    ],
    # plain torch.compile falls back to its modules one by one: there is no 5-D input in the block's graph
    "hunyuan_video15": [
        "context_embedder.token_refiner.refiner_blocks.0.attn self TEXT",
        "attn joint MASK text=16 last",
    ],
    "ltx": [
        "transformer_blocks.0.attn1 self REWRITTEN 3x4x6",
        "transformer_blocks.0.attn2 cross CROSS 3x4x6",
        "transformer_blocks.1.attn1 self REWRITTEN 3x4x6",
        "transformer_blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "mochi": ["pooler cross CROSS"],  # its joint attention runs between the pieces of a broken graph
    "allegro": [
        "transformer_blocks.0.attn1 self MASK_FLOAT 3x4x6",
        "transformer_blocks.0.attn2 cross CROSS 3x4x6",
        "transformer_blocks.1.attn1 self MASK_FLOAT 3x4x6",
        "transformer_blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "cosmos": [
        "transformer_blocks.0.attn1 self REWRITTEN 3x4x6",
        "transformer_blocks.0.attn2 cross CROSS 3x4x6",
        "transformer_blocks.1.attn1 self REWRITTEN 3x4x6",
        "transformer_blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "kandinsky5": [
        "text_transformer_blocks.0.self_attention self TEXT",
        "visual_transformer_blocks.0.self_attention self REWRITTEN 3x4x6",
        "visual_transformer_blocks.0.cross_attention cross CROSS 3x4x6",
        "visual_transformer_blocks.1.self_attention self REWRITTEN 3x4x6",
        "visual_transformer_blocks.1.cross_attention cross CROSS 3x4x6",
    ],
    "skyreels_v2": [
        "blocks.0.attn1 self REWRITTEN 3x4x6",
        "blocks.0.attn2 cross CROSS 3x4x6",
        "blocks.1.attn1 self REWRITTEN 3x4x6",
        "blocks.1.attn2 cross CROSS 3x4x6",
    ],
    "latte": [
        "transformer_blocks.0.attn1 self FACTORISED 1x4x6",
        "transformer_blocks.0.attn2 cross CROSS 1x4x6",
        "temporal_transformer_blocks.0.attn1 self FACTORISED",
    ],
    "easyanimate": [
        "transformer_blocks.0.attn1 joint REWRITTEN text=7 first 3x4x6",
        "transformer_blocks.1.attn1 joint REWRITTEN text=7 first 3x4x6",
    ],
    "motif_video": [
        "transformer_blocks.0.attn joint REWRITTEN text=7 last 3x4x6",
        "single_transformer_blocks.0.attn joint REWRITTEN text=7 last 3x4x6",
    ],
    "flux": [
        "transformer_blocks.0.attn joint NO_SIGN_OF_VIDEO text=7 first",
        "single_transformer_blocks.0.attn joint NO_SIGN_OF_VIDEO text=7 first",
    ],
    "image_vae": [
        "encoder.mid_block.attentions.0 self NO_SIGN_OF_VIDEO 1x4x6",
        "decoder.mid_block.attentions.0 self NO_SIGN_OF_VIDEO 1x4x6",
    ],
    "video_vae": ["attention.attentions.0 self FACTORISED 1x4x6"],
    "llama": ["layers.0.self_attn self MASK", "layers.1.self_attn self MASK"],
    "vit": [
        "layers.0.attention joint NO_SIGN_OF_VIDEO text=1 first 1x8x8",
        "layers.1.attention joint NO_SIGN_OF_VIDEO text=1 first 1x8x8",
    ],
}  # fmt: skip

REGIONAL = {
    "wan": ["attn1 self REWRITTEN", "attn2 cross CROSS"],
    "wan_i2v": ["attn1 self REWRITTEN", "attn2 cross CROSS", "attn2 cross CROSS"],
    "hunyuan_video": [
        "token_refiner.refiner_blocks.0.attn self TEXT",
        "attn joint REWRITTEN text=7 last",
        "attn joint REWRITTEN text=7 last",
    ],
    "ltx": ["attn1 self REWRITTEN", "attn2 cross CROSS"],
    "kandinsky5": [
        "self_attention self NO_SIGN_OF_VIDEO",
        "self_attention self REWRITTEN",
        "cross_attention cross CROSS",
    ],
    "skyreels_v2": ["attn1 self REWRITTEN", "attn2 cross CROSS"],
    "motif_video": ["attn joint REWRITTEN text=7 last", "attn joint REWRITTEN text=7 last"],
    "flux": [
        "attn joint NO_SIGN_OF_VIDEO text=7 first",
        "attn joint NO_SIGN_OF_VIDEO text=7 first",
    ],
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model(name: str) -> None:
    model, arguments = build(name)
    assert [described(site) for site in capture(model, arguments(F, H, W)).sites] == WHOLE[name]


@pytest.mark.parametrize("name", REGIONAL)
def test_block_by_block(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(F, H, W), regional=True)
    assert [described(site) for site in backend.sites] == REGIONAL[name]


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video", "ltx"])
def test_dynamic_shapes_change_no_verdict(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(F, H, W), dynamic=True)
    assert [described(site) for site in backend.sites] == WHOLE[name]
    lengths = [site.q_len for site in backend.sites if site.verdict.rewrite]
    assert all(isinstance(length, str) for length in lengths), "the graph is dynamic, and the site says so"


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_dynamic_blocks(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(F, H, W), regional=True, dynamic=True)
    assert [described(site) for site in backend.sites] == REGIONAL[name]


def test_one_frame_is_a_video_too() -> None:
    model, arguments = build("wan")
    assert described(capture(model, arguments(1, H, W)).sites[0]) == "blocks.0.attn1 self REWRITTEN 1x4x6"


def test_text_as_long_as_the_video_is_still_cross_attention() -> None:
    _, arguments = build("wan")
    call = arguments(F, H, W) | {"encoder_hidden_states": torch.randn(1, F * H * W, 16)}
    for regional in (False, True):
        first, second = capture(build("wan")[0], call, regional=regional).sites[:2]
        assert (first.q_len, first.k_len, second.q_len, second.k_len) == (72, 72, 72, 72)
        assert (first.kind, second.kind) == ("self", "cross")


@pytest.mark.parametrize("name", ["flux", "image_vae", "video_vae", "vit", "llama"])
def test_default_thresholds_leave_other_models_alone(name: str) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(1, 64, 64), knobs=Knobs(min_tokens=8192))
    assert backend.sites
    assert not [site for site in backend.sites if site.verdict.rewrite]
    if name == "flux":
        assert backend.sites[0].q_len == 4096 + TEXT


def test_a_short_video_stays_dense() -> None:
    model, arguments = build("wan")
    verdict = capture(model, arguments(F, H, W), knobs=Knobs(min_tokens=73)).sites[0].verdict
    assert (verdict.reason.name, verdict.detail) == ("TOO_FEW_TOKENS", "72 of at least 73")


def test_text_does_not_count_as_video_tokens() -> None:
    model, arguments = build("cogvideox")
    assert not capture(model, arguments(F, H, W), knobs=Knobs(min_tokens=73)).sites[0].verdict.rewrite


@pytest.mark.parametrize(
    ("pattern", "rewritten"),
    [
        ("single_transformer_blocks.*", ["single_transformer_blocks.0.attn"]),
        ("*.attn", [0, 0]),
        ("attn1", []),
    ],
)
def test_sites_names_modules(pattern: str, rewritten: list[object]) -> None:
    model, arguments = build("flux")
    backend = capture(model, arguments(1, H, W), knobs=Knobs(sites=(pattern,)))
    found = [site.module_path for site in backend.sites if site.verdict.rewrite]
    assert len(found) == len(rewritten)
    assert rewritten == found or 0 in rewritten


def test_sites_cannot_make_cross_attention_sparse() -> None:
    model, arguments = build("wan")
    sites = capture(model, arguments(F, H, W), knobs=Knobs(sites=("*",))).sites
    assert [site.verdict.rewrite for site in sites] == [True, False, True, False]


def test_training_stays_dense() -> None:
    model, arguments = build("wan")
    torch._dynamo.reset()
    backend = Backend()
    torch.compile(model, backend=backend)(**arguments(F, H, W))
    torch._dynamo.reset()
    assert [site.verdict.reason.name for site in backend.sites] == ["GRAD", "CROSS"] * 2
