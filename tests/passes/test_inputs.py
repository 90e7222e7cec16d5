"""The host finds the timestep, the rotary tables and the layer's parameter, wherever SymInts push them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.capture import Backend, Captured, Knobs, capture, compiled, fresh_dynamo
from models.graphs import captured, heads, tokens, video
from models.tiny import build
from torch import Tensor, nn

from svg_ear_compile.passes.inputs import mask_arguments


def names(graph: Captured) -> dict[str, Any]:
    inputs, placeholders = graph.inputs, graph.placeholders

    def name(i: int | None) -> str | None:
        return None if i is None else placeholders[i]

    return {
        "timestep": name(inputs.timestep),
        "temb": name(inputs.temb),
        "rotary": [name(i) for i in inputs.rotary],
        "parameters": [name(i) for i in inputs.parameters.values()],
    }


@pytest.mark.parametrize("dynamic", [None, True])
def test_whole_model(dynamic: bool | None) -> None:
    model, arguments = build("cogvideox")
    found = names(capture(model, arguments(3, 4, 6), dynamic=dynamic).captured[0])
    block = "l_self_dict_modules_transformer_blocks_modules_{}_modules_attn1_modules_to_q_parameters_weight_"
    assert found == {
        "timestep": "l_kwargs_timestep_",
        "temb": None,
        "rotary": ["l_kwargs_image_rotary_emb_0_", "l_kwargs_image_rotary_emb_1_"],
        "parameters": [block.format(0), block.format(1)],
    }


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_block(dynamic: bool | None) -> None:
    model, arguments = build("wan")
    found = names(capture(model, arguments(3, 4, 6), regional=True, dynamic=dynamic).captured[0])
    assert found == {
        "timestep": None,
        "temb": "l_temb_",
        "rotary": ["l_rotary_emb_0_", "l_rotary_emb_1_"],
        "parameters": ["l_self_modules_attn1_modules_to_q_parameters_weight_"],
    }


def test_arguments_by_position_are_named_by_the_wrapped_forward() -> None:
    model, arguments = build("wan")
    given = arguments(3, 4, 6)
    by_position = [given.pop(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    backend = Backend(Knobs())
    with fresh_dynamo(), torch.no_grad():
        compiled(model, backend)(*by_position, **given)
    assert names(backend.captured[0])["timestep"] == "l_args_1_"


def test_arguments_of_a_hooked_block() -> None:
    """Offloading wraps forward(*args) and breaks the graph before it."""
    from diffusers.hooks import apply_group_offloading

    model, arguments = build("hunyuan_video")
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    backend = Backend(Knobs())
    with fresh_dynamo():
        model.compile_repeated_blocks(backend=backend)
        model(**arguments(3, 4, 6))
    found = [names(graph) for graph in backend.captured if any(s.verdict.rewrite for s in graph.sites)]
    assert len(found) == 2
    for graph in found:
        assert graph["temb"] == "l_stack0_0_2_"
        assert graph["rotary"] == ["l_stack0_0_4_0_", "l_stack0_0_4_1_"]
        assert graph["timestep"] is None


def test_the_parameter_tells_blocks_apart() -> None:
    model, arguments = build("wan")
    seen: list[object] = []

    def inner(gm: torch.fx.GraphModule, _: list[object]) -> object:
        position = backend.captured[-1].inputs.parameters[0]

        def run(*args: object) -> object:
            seen.append(args[position])
            return gm.forward(*args)

        return run

    backend = Backend(inner=inner)
    with fresh_dynamo():
        compiled(model, backend, regional=True)(**arguments(3, 4, 6))
    assert [any(w is block.attn1.to_q.weight for block in model.blocks) for w in seen] == [True, True]
    assert seen[0] is not seen[1]


class Projected(nn.Module):
    """Self attention with a query projection given from outside."""

    def __init__(self, to_q: nn.Module) -> None:
        super().__init__()
        self.to_q, self.to_k = to_q, nn.Linear(32, 32)

    def forward(self, clip: Tensor) -> Tensor:
        x = tokens(clip)
        return F.scaled_dot_product_attention(heads(self.to_q(x)), heads(self.to_k(x)), heads(x))


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(32, 32)
        self.lora_A, self.lora_B = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


class Dequantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * 0.1).t()


@pytest.mark.parametrize(
    ("to_q", "name"),
    [
        (nn.Linear(32, 32), "to_q_parameters_weight_"),
        (nn.Sequential(nn.Linear(32, 32, bias=False), nn.LayerNorm(32)), "to_q_modules_0_parameters_weight_"),
        (Lora(), "to_q_modules_base_layer_parameters_weight_"),
        (Dequantized(), "to_q_parameters_weight_"),
    ],
)
def test_query_projections(to_q: nn.Module, name: str) -> None:
    (parameter,) = names(captured(Projected(to_q), video()))["parameters"]
    assert parameter.endswith(name)


def test_fused_projections() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv = nn.Linear(32, 96)

        def forward(self, clip: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(heads(x) for x in self.to_qkv(tokens(clip)).chunk(3, -1)))

    (parameter,) = names(captured(Fused(), video()))["parameters"]
    assert parameter.endswith("to_qkv_parameters_weight_")


def test_no_projection_is_no_parameter() -> None:
    def f(clip: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x)

    assert captured(f, video()).inputs.parameters == {}


def mask_arguments_of(graph: Captured) -> list[str] | None:
    """Names of what the first site's mask is made from."""
    mask = next(site.key_mask for site in graph.sites if site.verdict.rewrite)
    assert mask is not None
    found = mask_arguments(mask.node)
    return None if found is None else [graph.placeholders[i] for i in found]


@pytest.mark.parametrize(
    ("name", "regional", "argument", "dynamic"),
    [
        ("hunyuan_video", False, "l_kwargs_encoder_attention_mask_", None),
        ("hunyuan_video", True, "l_attention_mask_", True),
        ("hunyuan_video15", True, "l_attention_mask_", None),
        ("motif_video", False, "l_encoder_attention_mask_", True),
        ("allegro", False, "l_attention_mask_", None),
    ],
)
def test_what_a_mask_is_made_from(name: str, regional: bool, argument: str, dynamic: bool | None) -> None:
    model, arguments = build(name)
    backend = capture(model, arguments(3, 4, 6), regional=regional, dynamic=dynamic)
    graph = next(graph for graph in backend.captured if any(site.verdict.rewrite for site in graph.sites))
    (found,) = mask_arguments_of(graph) or ()
    assert found.endswith(argument)


def over(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def f(clip: Tensor, padding: Tensor) -> Tensor:
        x = heads(tokens(clip))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(padding)[:, None, None])

    return f


def written(padding: Tensor) -> Tensor:
    shown = padding.clone()
    shown[:, 3:9] = False
    return shown


def written_by_a_view(padding: Tensor) -> Tensor:
    shown = padding.clone()
    shown.unsqueeze(0)[..., 0].logical_not_()
    return shown


def augmented(padding: Tensor) -> Tensor:
    shown = padding.clone()
    half = shown[:, :36]
    half &= False
    return shown


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (lambda m: m, ["l_padding_"]),
        (lambda m: m & (torch.arange(72) < 70), ["l_padding_"]),
        (lambda m: torch.arange(72)[None] < 70, []),
        (lambda m: m & (torch.rand(72) < 0.5), None),
        (written, None),
        (written_by_a_view, None),
        (augmented, None),
    ],
)
def test_masks_that_are_no_function_of_arguments(mask: Callable[[Tensor], Tensor], found: Any) -> None:
    graph = captured(over(mask), video(), torch.ones(1, 72, dtype=torch.bool))
    assert mask_arguments_of(graph) == found
