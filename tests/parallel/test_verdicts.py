"""What the passes say about diffusers' models under context parallelism. Collectives of one process are fakes."""

from __future__ import annotations

import diffusers
import pytest
import torch
from models.capture import Backend, Knobs, described, fresh_dynamo
from parallel.worlds import fake_world, spread, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from toy import ToyInputs, ToyVideo

GRID = (3, 4, 6)
"""Two ranks have a frame and a half each."""
VIDEO = "attn1 self REWRITTEN"
JOINT = "attn joint REWRITTEN text=8 last"


def capture(name: str, way: str, ranks: int = 2, rank: int = 0, dynamic: bool | None = None) -> Backend:
    backend = Backend(Knobs())
    with fake_world(ranks, rank), fresh_dynamo():
        model, call = tiny(name, GRID)
        spread(model, ulysses_degree=ranks)
        if way == "whole":
            torch.compile(model, backend=backend, dynamic=dynamic)(**call)
        else:
            model.compile_repeated_blocks(backend=backend, dynamic=dynamic)
            model(**call)
    return backend


@pytest.mark.parametrize(
    ("name", "way", "dynamic", "expected"),
    [
        pytest.param("wan", "whole", None, [VIDEO, VIDEO], marks=pytest.mark.slow),
        ("wan", "regional", True, [VIDEO, VIDEO]),
        pytest.param("hunyuan_video", "regional", True, [JOINT, JOINT], marks=pytest.mark.slow),
        pytest.param(
            "hunyuan_video", "whole", None,
            [f"{JOINT} 3x4x6", f"single_transformer_blocks.0.{JOINT} 3x4x6"], marks=pytest.mark.slow,
        ),
        ("ltx", "whole", None, [f"transformer_blocks.{i}.{VIDEO} 3x4x6" for i in (0, 1)]),
        ("ltx", "regional", None, [VIDEO]),
    ],
)  # fmt: skip
def test_self_attention_of_all_ranks_tokens(
    name: str, way: str, dynamic: bool | None, expected: list[str]
) -> None:
    backend = capture(name, way, dynamic=dynamic)
    rewritten = [site for site in backend.sites if site.verdict.rewrite]
    assert [described(site) for site in rewritten] == expected
    assert {(site.heads, site.layout.shards, site.layout.shard) for site in rewritten} == {(1, 2, 0)}
    assert {site.q_hint for site in rewritten} <= {72, 80}, "the tokens of both ranks"
    others = {site.kind for site in backend.sites} - {site.kind for site in rewritten}
    assert others <= {"cross", "self"}


def test_the_grid_is_that_of_the_whole_video() -> None:
    (first, *_) = (c for c in capture("wan", "regional", rank=1).captured if c.inputs.rotary)
    assert (first.inputs.shards, first.inputs.shard) == (2, 1)
    assert "rotary tables over 3 x 4 x 6 tokens" in str(first.sites[0].verdict)


def test_ring_attention_is_named_and_left_as_it_is() -> None:
    backend = Backend(Knobs())
    with fake_world(4), fresh_dynamo():
        model, call = tiny("wan", GRID)
        model.set_attention_backend("_native_flash")  # "native" gives no log-sum-exp, which a ring needs
        spread(model, ring_degree=2, ulysses_degree=2)
        model.compile_repeated_blocks(backend=backend)
        with pytest.raises(NotImplementedError, match="flash_attention"):  # there is none on a CPU
            model(**call)
    (ring,) = {words for captured in backend.captured for words in captured.others}
    assert ring.startswith("ring attention in attn1 (")
    assert "ulysses_degree" in ring
    assert not any(site.verdict.rewrite for site in backend.sites)


def test_ulysses_anything_cannot_be_compiled_by_any_backend() -> None:
    """If this fails, torch or diffusers has learnt it: then tokens in unequal shares have to be looked at."""
    with fake_world(2), fresh_dynamo():
        model, call = tiny("wan", GRID)
        spread(model, ulysses_degree=2, ulysses_anything=True)
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="all_to_all_single_any_qkv_async"):
            torch.compile(model, backend="eager")(**call)


def test_tensor_parallel_attention_is_rewritten_on_its_share_of_the_heads() -> None:
    """As torch's parallelize_module makes it. diffusers' TensorParallelConfig is for image models alone."""
    backend = Backend(Knobs())
    with fake_world(2), fresh_dynamo():
        mesh = init_device_mesh("cpu", (2,))
        model = ToyVideo(layers=1).eval()
        for attention in (model.blocks[0].attn1, model.blocks[0].attn2):
            attention.heads //= 2
            projections = {f"to_{name}": ColwiseParallel() for name in "qkv"}
            parallelize_module(attention, mesh, projections | {"to_out": RowwiseParallel()})
        torch.compile(model, backend=backend, fullgraph=True)(*ToyInputs()())
    assert [described(site) for site in backend.sites] == [
        "blocks.0.attn1 self REWRITTEN 4x8x8", "blocks.0.attn2 cross CROSS 4x8x8",
    ]  # fmt: skip
    assert {site.heads for site in backend.sites} == {1}


def test_which_video_models_diffusers_spreads_over_gpus() -> None:
    """If this fails, the list of what works on several GPUs has to name others."""
    names = [name for name in dir(diffusers) if name.endswith(("Transformer3DModel", "OmniTransformer"))]
    classes = {name: getattr(diffusers, name) for name in names}
    planned = {name for name, kind in classes.items() if getattr(kind, "_cp_plan", None)}
    assert planned == {
        "ChronoEditTransformer3DModel", "HeliosTransformer3DModel", "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel", "MiniMaxH3Transformer3DModel", "WanTransformer3DModel",
    }  # fmt: skip
    assert not any(getattr(kind, "_tp_plan", None) for kind in classes.values())
