"""Is a flex_attention call plain attention? With no score function and a mask that hides nothing, it is.

Dynamo leaves the call as one higher-order op. Its score function and mask function are graphs of their own:
the first returns its first argument, the second ones; and a single block covers everything.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .by_hand import Written

_NO_MASK_BLOCK = 1 << 30
"""The block size that flex_attention itself chooses when it is given no mask."""


def plain_flex(node: fx.Node) -> Written | None:
    """The arguments of a flex_attention's output that is plain attention; `node` is item 0 of the call."""
    call = node.args[0] if node.target is operator.getitem and node.args[1:] == (0,) else None
    if not isinstance(call, fx.Node) or call.target is not torch.ops.higher_order.flex_attention:
        return None
    query, key, value, score_mod, block_mask, scale, *_, score_buffers, mask_buffers = call.args
    if set(call.users) != {node} or score_buffers or mask_buffers or not isinstance(scale, (int, float)):
        return None
    *_, q_block, k_block, mask_mod = block_mask  # type: ignore[misc, union-attr]
    whole = q_block == k_block == _NO_MASK_BLOCK
    if not whole or not _returns_its_first(score_mod) or not _returns_ones(mask_mod):
        return None
    return Written(query, key, value, None, 0.0, float(scale))  # type: ignore[arg-type]


def _output(node: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """(what the graph of a get_attr node returns, its first placeholder)."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None, None
    module = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(module, fx.GraphModule):
        return None, None
    found = module.graph.output_node().args[0]
    found = found[0] if isinstance(found, (tuple, list)) and len(found) == 1 else found
    first = next(iter(module.graph.find_nodes(op="placeholder")), None)
    return (found if isinstance(found, fx.Node) else None), first


def _returns_its_first(node: Any) -> bool:
    found, first = _output(node)
    return found is not None and found is first


def _returns_ones(node: Any) -> bool:
    found, _ = _output(node)
    return found is not None and found.target in ("new_ones", torch.ones)
