"""Is this attention that does not call scaled_dot_product_attention? It is named, and left as it is.

- a product of a softmax of a product: softmax(q k^T * scale + bias) v, by matmul, bmm or einsum
- torch.nn.MultiheadAttention and TransformerEncoderLayer, which Dynamo keeps as one call
- flex_attention, packages with kernels of their own, and the kernels of scaled_dot_product_attention called by name
- ring attention, which joins the results of any of these over the keys of all ranks
"""

from __future__ import annotations

import re

from torch import fx

from .fx_utils import argument, op_name
from .sizes import example, is_tensor

_PRODUCTS = {"matmul", "bmm", "__matmul__", "einsum", "baddbmm"}
_BETWEEN = {"to", "float", "half", "bfloat16", "type_as", "type", "contiguous", "dropout"}
_MULTIHEAD = {
    "multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
}  # fmt: skip
_PACKAGES = re.compile(
    r"flex_attention|flash_attn|sage_?attn|xformers|memory_efficient|_scaled_dot_product_\w+_attention",
    re.IGNORECASE,
)
_CALL_SDPA = "only F.scaled_dot_product_attention is rewritten"
_NATIVE = (
    'in diffusers, call model.set_attention_backend("native"); reset_attention_backend() leaves the other one in '
    "place for all models"
)
_ULYSSES = (
    "no rank sees all keys at once: ContextParallelConfig(ulysses_degree=...) instead of ring_degree gives each rank "
    "all tokens of its share of the heads"
)


def unfused_attention(node: fx.Node) -> tuple[str, str] | None:
    """(what kind of attention ends with this node, what to do about it), or None."""
    name = op_name(node)
    if _is_written_out(node):
        return "attention written out as matrix products", _CALL_SDPA
    if name in _MULTIHEAD:
        return f"torch.nn's {name}", _CALL_SDPA
    if "mask" in name or not _PACKAGES.search(name):
        return None
    if _is_ring(node):
        return "ring attention", _ULYSSES
    chosen = "attention_dispatch.py" in (node.meta.get("stack_trace") or "")
    return name, _NATIVE if chosen else _CALL_SDPA


def _is_ring(node: fx.Node) -> bool:
    """Whether keys come from other ranks, and the log-sum-exp of an attention call is used: to join its results."""
    gathers = any(op_name(n).startswith("all_gather") for n in node.graph.nodes)
    return gathers and any(user.args[1:] == (1,) and user.users for user in node.users)


def _is_written_out(last: fx.Node) -> bool:
    """Whether a softmax of a product enters the product `last` as its first operand."""
    node = _operand(last) if op_name(last) in _PRODUCTS else None
    while node is not None and op_name(node) in _BETWEEN:
        node = _operand(node)
    if node is None or op_name(node) != "softmax":
        return False
    if argument(node, 1, "dim") not in (-1, example(node).dim() - 1):
        return False
    for _ in range(6):  # scale, bias, mask, casts
        node = _operand(node) if node is not None else None
        if node is not None and op_name(node) in _PRODUCTS:
            return True
    return False


def _operand(node: fx.Node) -> fx.Node | None:
    """The tensor operand that carries the values: the first one; for `where`, the first after the condition."""
    operands = [n for n in node.all_input_nodes if is_tensor(n)]
    return operands[min(op_name(node) == "where", len(operands) - 1)] if operands else None
