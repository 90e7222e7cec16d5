"""What diffusers does to a transformer's layers: LoRA, fused projections, offloading, other attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import calls, compiled
from usage.wan import DENSITY_1, LAYERS, ROUNDING, arguments, blockwise, error, wan

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]

WAYS = {"whole": compiled, "blockwise": blockwise}
ways = pytest.mark.parametrize("how", ["blockwise", pytest.param("whole", marks=pytest.mark.slow)])
FIRST_DENSE = {**DENSITY_1, "dense_layers": 1}
"""To see that layers are told apart."""


def lora(seed: int) -> dict[str, Tensor]:
    """Weights of an adapter, as a file would hold them."""
    peft = pytest.importorskip("peft")
    model = wan()
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    weights = peft.utils.get_peft_model_state_dict(model, adapter_name="default")
    return {f"transformer.{name}": weight.clone() for name, weight in weights.items()}


def adapted(weights: dict[str, Tensor]) -> Any:
    model = wan()
    model.load_lora_adapter(dict(weights), adapter_name="style")
    return model


@ways
def test_lora_loaded_before_and_swapped_after(how: str) -> None:
    first, second = lora(1), lora(2)
    expected = [adapted(weights)(**arguments())[0] for weights in (first, second)]
    assert error(*expected) > 0.01
    model = adapted(first)
    run = WAYS[how](model, FIRST_DENSE)
    assert error(run(**arguments())[0], expected[0]) < ROUNDING
    assert calls() == (1, {"dense layers": 1})
    model.load_lora_adapter(dict(second), adapter_name="style", hotswap=True)
    assert error(run(**arguments())[0], expected[1]) < ROUNDING
    assert calls() == (2, {"dense layers": 2})
    assert len(svg_ear_compile.report().graphs) == 1, "not compiled again"


@ways
def test_lora_switched_off(how: str) -> None:
    model = adapted(lora(1))
    run = WAYS[how](model, FIRST_DENSE)
    run(**arguments())
    model.disable_adapters()
    assert error(run(**arguments())[0], wan()(**arguments())[0]) < ROUNDING
    assert calls() == (2, {"dense layers": 2})


@ways
def test_fused_projections(how: str) -> None:
    model = wan()
    expected = model(**arguments())[0]
    model.fuse_qkv_projections()
    assert error(WAYS[how](model, FIRST_DENSE)(**arguments())[0], expected) < ROUNDING
    assert calls() == (1, {"dense layers": 1})


def offloaded(model: Any, offload_type: str = "block_level") -> Any:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=offload_type, **groups)
    return model


@ways
def test_group_offloading_of_blocks(how: str) -> None:
    """Hooks break each block's graph and take the names of its arguments; what was in them is still found."""
    expected = [wan()(**arguments(t))[0] for t in (900, 700, 500)]
    options = {**FIRST_DENSE, "dense_steps": 1, "num_steps": 3}
    fullgraph = {} if how == "whole" else {"fullgraph": False}
    run = WAYS[how](offloaded(wan()), options, **fullgraph)
    for timestep, dense in zip((900, 700, 500), expected, strict=True):
        assert error(run(**arguments(timestep))[0], dense) < ROUNDING
    assert calls() == (2, {"warm-up steps": LAYERS, "dense layers": 2})
    text = str(svg_ear_compile.report())
    assert "1 dense first steps, of 3" in text
    assert "3 x 16 x 16" in text, text


def test_group_offloading_of_leaves_is_dense_and_says_why() -> None:
    """Each projection is a graph of its own: what attention is over is not in its graph."""
    expected = wan()(**arguments())[0]
    run = blockwise(offloaded(wan(), "leaf_level"), FIRST_DENSE, fullgraph=False)
    assert error(run(**arguments())[0], expected) < ROUNDING
    reasons = [site.decision.reason for site in svg_ear_compile.report().sites]
    assert reasons == ["AFTER_BREAK", "CROSS"]
    assert 'offload_type="block_level"' in str(svg_ear_compile.report())


def test_weights_moved_between_calls() -> None:
    """As offloading of whole models does: same Parameters, other storage."""
    model = wan()
    expected = model(**arguments())[0]
    run = compiled(model, FIRST_DENSE)
    run(**arguments())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert error(run(**arguments())[0], expected) < ROUNDING
    assert calls() == (2, {"dense layers": 2})
    assert len(svg_ear_compile.report().graphs) == 1


def test_int8_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = wan()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = model(**arguments())[0]
    assert error(compiled(model, FIRST_DENSE)(**arguments())[0], expected) < ROUNDING
    assert calls() == (1, {"dense layers": 1})


@pytest.mark.parametrize("backend", ["_native_math", pytest.param("flex", marks=pytest.mark.slow)])
def test_another_attention_backend_is_dense_and_the_hint_helps(backend: str) -> None:
    expected, model = wan()(**arguments())[0], wan()
    model.set_attention_backend(backend)
    run = compiled(model, DENSITY_1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="svg_ear found no scaled_dot_product_attention")
        assert error(run(**arguments())[0], expected) < ROUNDING
    assert calls() == (0, {})
    assert 'model.set_attention_backend("native")' in str(svg_ear_compile.report())
    model.set_attention_backend("native")
    assert error(run(**arguments())[0], expected) < ROUNDING
    assert calls() == (LAYERS, {})
