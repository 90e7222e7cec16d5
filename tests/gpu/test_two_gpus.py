"""Two GPUs with NCCL: diffusers' Ulysses attention gives what one GPU gives."""

from __future__ import annotations

import pytest
import torch
from gpu.cuda import inputs
from parallel.worlds import Figures, tiny, two_processes
from toy import EAGER

import svg_ear_compile

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Figures]]:
    return two_processes(tmp_path_factory.mktemp("ranks"), "cuda")


@pytest.mark.parametrize("name", ["wan whole 1.0", "hunyuan_video fullgraph 1.0", "minimax_h3 regional 1.0"])
def test_density_one_equals_one_gpu(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        assert rank[name]["off"] <= 2 * rank[name]["rounding"]
        assert (rank[name]["sparse_calls"], rank[name]["dense_calls"]) == (2, {})


@pytest.mark.parametrize("name", ["wan regional 0.3", "hunyuan_video fullgraph 0.3"])
def test_equals_the_joint_softmax_of_its_plans(ranks: list[dict[str, Figures]], name: str) -> None:
    for rank in ranks:
        found = rank[name]
        assert found["off"] <= 2 * found["rounding"]
        assert (found["skips"], found["cubes"], found["text_exact"]) == (True, True, True)


def test_fully_sharded_weights(ranks: list[dict[str, Figures]]) -> None:
    for rank in ranks:
        assert rank["wan FSDP2 1.0"]["off"] <= 2 * rank["wan FSDP2 1.0"]["rounding"]
        assert rank["wan FSDP2 1.0"]["sparse_calls"] == 2


def test_a_rank_that_fails_is_dense_alone(ranks: list[dict[str, Figures]]) -> None:
    sparse, dense = (rank["one rank fails"] for rank in ranks)
    assert (sparse["fallbacks"], dense["fallbacks"]) == (0, 2)
    assert sparse["off"] == dense["off"]


@pytest.mark.usefixtures("fresh")
def test_layers_of_one_model_on_two_gpus() -> None:
    """device_map: one process, each layer where its weights are. Hooks inside of blocks break graphs; those around
    blocks, which move what arrives, are enough."""
    accelerate = pytest.importorskip("accelerate")
    model, call = tiny("wan", (3, 16, 16))
    call = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in call.items()}
    expected = model.cuda()(**call)[0]
    first = ("rope", "patch_embedding", "condition_embedder", "blocks.0")
    last = ("blocks.1", "norm_out", "proj_out", "scale_shift_table")
    model = accelerate.dispatch_model(model, dict.fromkeys(first, 0) | dict.fromkeys(last, 1))
    for block in model.blocks:
        for part in block.children():
            accelerate.hooks.remove_hook_from_submodules(part)
    model.compile_repeated_blocks(backend="svg_ear", options={**EAGER, "min_tokens": 1, "density": 1.0})
    got = model(**call)[0]
    assert svg_ear_compile.report().totals()["sparse_calls"] == 2
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh")
def test_tensors_on_another_than_the_current_gpu() -> None:
    qkv = inputs((1, 2, 1024, 64))
    options = {"grid": (4, 16, 16), "density": 0.3}
    expected = svg_ear_compile.attention(*qkv, **options)
    got = svg_ear_compile.attention(*(x.to("cuda:1") for x in qkv), **options)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=0, atol=0)
