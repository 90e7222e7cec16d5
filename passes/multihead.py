"""How does attention inside of torch.nn.MultiheadAttention come to light? As its parts, in place of one call.

Dynamo keeps F.multi_head_attention_forward as one node. With packed weights, nobody using its attention
weights and no more than a key-padding mask, over one and the same input it is (x is [L,B,E] there)

    out = linear(sdpa(*linear(x, W, b) as heads), W_out, b_out)

and then the site is one as any other. Anything else stays the call that it was, and `left_over` says why.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from svg_ear_compile.kernels import ops

from .axis_moves import op_name
from .match import SDPA, named
from .rewrite import copy_graph
from .sizes import example, is_tensor

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


# A whole layer in one call: what torch.nn.TransformerEncoderLayer does in eval mode without gradients.
_FAST_PATHS = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
_NO_FAST_PATH = "torch.backends.mha.set_fastpath_enabled(False) makes it a call that can be rewritten"


def expand(gm: fx.GraphModule) -> fx.GraphModule:
    """gm itself, or where such calls are in its graph, a module whose graph has their parts instead."""
    if all(_arguments(node) is None or _obstacle(node) for node in gm.graph.nodes):
        return gm
    graph, _ = copy_graph(gm.graph)
    for node in list(graph.nodes):
        arguments = _arguments(node)
        if arguments is not None and not _obstacle(node):
            _replace(graph, node, arguments)
    graph.lint()
    return fx.GraphModule(gm, graph)


def left_over(graph: fx.Graph) -> list[str]:
    """What the report says of such calls that stay."""
    found = []
    for node in graph.nodes:
        obstacle = _NO_FAST_PATH if op_name(node) in _FAST_PATHS else _obstacle(node)
        if obstacle:
            found.append(f"{named('multi-head attention in one call', node)}, {obstacle}")
    return found


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """All arguments of such a call; None for any other node."""
    if node.target is not F.multi_head_attention_forward:
        return None
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _obstacle(node: fx.Node) -> str:
    """Why such a call cannot be expanded; '' if it can, and for other nodes."""
    a = _arguments(node)
    if a is None:
        return ""
    x = example(a["query"])
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    obstacles = {
        "for it has no packed weights": a["use_separate_proj_weight"] or not is_tensor(a["in_proj_weight"]),
        "for its keys or values are not its queries": not a["query"] is a["key"] is a["value"],
        "for its attention weights are used": any(user.args[1:] != (0,) for user in node.users),
        "for it has an attn_mask": a["attn_mask"] is not None or a["is_causal"],
        "for its key_padding_mask is not bool": a["key_padding_mask"] is not None
        and _ignored(a["key_padding_mask"]) is None,
        "for it adds keys of its own": a["add_zero_attn"] or any(a[name] is not None for name in extra),
        "for it drops out weights": a["training"] and a["dropout_p"] > 0,
        "for its input has no batch": x.dim() != 3,
    }
    return next((words for words, holds in obstacles.items() if holds), "")


def _ignored(mask: fx.Node) -> fx.Node | None:
    """The bool tensor [B,L] that is True where a key is ignored. The module makes it a bias of 0 and -inf."""
    if op_name(mask) in ("masked_fill", "masked_fill_") and mask.args[2] == -torch.inf:
        zeros, mask = mask.args[:2]  # type: ignore[assignment]
        if op_name(zeros) not in ("zeros_like", "zeros"):
            return None
    return mask if is_tensor(mask) and example(mask).dtype == torch.bool else None


def _replace(graph: fx.Graph, node: fx.Node, a: dict[str, Any]) -> None:
    def value(x: Any) -> Any:
        return example(x) if isinstance(x, fx.Node) else x

    def annotated(new: fx.Node, result: Any) -> fx.Node:
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        new.meta["example_value"] = result
        return new

    def call(target: Any, *args: Any) -> fx.Node:
        return annotated(graph.call_function(target, args), target(*map(value, args)))

    def method(name: str, x: fx.Node, *args: Any) -> fx.Node:
        return annotated(graph.call_method(name, (x, *args)), getattr(example(x), name)(*args))

    with graph.inserting_before(node), torch.no_grad():
        packed = call(F.linear, a["query"], a["in_proj_weight"], a["in_proj_bias"])
        chunks = method("chunk", packed, 3, -1)
        parts = [call(operator.getitem, chunks, i) for i in range(3)]
        heads = [method("unflatten", part, -1, (a["num_heads"], -1)) for part in parts]  # [L,B,H,D]
        q, k, v = (method("permute", x, 1, 2, 0, 3) for x in heads)
        mask = None if a["key_padding_mask"] is None else _ignored(a["key_padding_mask"])
        if mask is not None:
            mask = method("unsqueeze", method("unsqueeze", method("logical_not", mask), 1), 1)
        out = graph.call_function(SDPA, (q, k, v), {"attn_mask": mask})
        annotated(out, ops.like_output(example(q)))
        merged = method("flatten", method("permute", out, 2, 0, 1, 3), 2)
        result = call(F.linear, merged, a["out_proj_weight"], a["out_proj_bias"])
    for user in list(node.users):  # (output, None)
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    if not node.users:
        graph.erase_node(node)
