"""What does an attention mask hide? Only a mask over keys, the same for all queries, fits block lists.

Models write such a mask in three ways; all of them end as the operand [B or 1, 1, 1, S] bool of our ops:

- as that operand itself (HunyuanVideo, Motif);
- as an outer product, padding[:, None] & padding[None, :] (HunyuanVideo 1.5): one factor hides keys, and the
  other hides all keys from padded queries, for which scaled_dot_product_attention gives zeros. So does the
  rewrite, with the same vector as [B, 1, S, 1], so that these rows hold what the model put there (HunyuanVideo 1.5
  never reads them: they are padded text, hidden as keys in all blocks, and not part of the output). Nothing of
  size S x S is left;
- as a bias, (1 - keep) * -10000 (Allegro), where `keep` was bool before, so that it holds only 0 and -10000:
  exp(-10000) is 0 in every dtype. The result differs only if all keys are hidden.

A site with any other bias stays dense: it may be a relative position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .fx_utils import argument, op_name
from .match import AttentionNode
from .site import KeyMask, Reason
from .sizes import example, hint, is_tensor, shape, shown

HIDES = -1e4
"""Scores of at most this hide a key: exp(-10000) is 0 in every dtype."""
_SAME_VALUES = {"to", "bool", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone"}
_MORE_DIMENSIONS = {"unsqueeze", "view", "reshape", "expand", "repeat", "flatten", "getitem"}


def read_mask(call: AttentionNode) -> tuple[str, Reason | None, KeyMask | None]:
    """(the mask in words, why it keeps the site dense or None, the operand of the ops)."""
    if call.attn_mask is None:
        return "none", None, None
    mask = example(call.attn_mask)
    if not isinstance(mask, torch.Tensor):
        return "unknown", Reason.MASK, None
    words = f"[{','.join(str(shown(size)) for size in mask.shape)}]"
    sizes = [hint(size) for size in mask.shape]
    batch, keys = (hint(example(n).shape[d]) for n, d in ((call.query, 0), (call.key, -2)))
    if mask.dtype != torch.bool:
        words = f"bias {words} {str(mask.dtype).removeprefix('torch.')}"
        keep = _kept_keys(call.attn_mask, batch, keys) if len(sizes) == 4 and sizes[2] == 1 else None
        if keep is None:
            return words, Reason.MASK_FLOAT, None
        return f"key padding {words}", None, KeyMask(keep)
    if len(sizes) == 4 and sizes[1:3] == [1, 1] and sizes[0] in (1, batch) and sizes[3] == keys:
        return f"key padding {words} bool", None, KeyMask(call.attn_mask)
    outer = _factors(call.attn_mask, batch, keys)
    if outer is not None:
        return f"outer product of key padding {words} bool", None, outer
    if _is_frame_causal(call.attn_mask):
        return f"causal {words} bool", Reason.MASK_CAUSAL, None
    return f"{words} bool", Reason.MASK, None


def _factors(mask: fx.Node, batch: int | None, keys: int | None) -> KeyMask | None:
    """The [B,1,1,S] factor of an outer product of one padding vector with itself."""
    product = _without(mask, _SAME_VALUES)
    if op_name(product) not in ("and_", "logical_and", "bitwise_and", "mul") or not all(
        map(is_tensor, product.args[:2])
    ):
        return None
    sides = {_varies_along(node): node for node in product.args[:2] if isinstance(node, fx.Node)}
    if set(sides) != {"keys", "queries"}:
        return None
    vectors = [_without(node, _SAME_VALUES | _MORE_DIMENSIONS | {"transpose"}) for node in sides.values()]
    keep = _thin(sides["keys"], (batch, keys))
    if vectors[0] is not vectors[1] or keep is None or example(keep).dtype != torch.bool:
        return None
    return KeyMask(keep, zero_rows=True)


def _varies_along(node: fx.Node) -> str:
    """'keys' or 'queries' for a factor ([B,1,S,S], [B,1,1,S] or [B,1,S,1]) constant along the other."""
    flipped = False
    while True:
        sizes = shape(node) or ()
        if len(sizes) == 4 and 1 in sizes[2:] and sizes[1] == 1:
            return "queries" if (sizes[2] > 1) != flipped else "keys"
        name = op_name(node)
        if name == "transpose" and {d % 4 for d in node.args[1:3] if isinstance(d, int)} == {2, 3}:
            flipped = not flipped
        elif name not in _SAME_VALUES | {"repeat", "expand"}:
            return ""
        before = node.args[0]
        if not isinstance(before, fx.Node):
            return ""
        node = before


def _thin(node: fx.Node, sizes: tuple[int | None, int | None]) -> fx.Node | None:
    """The [B or 1, 1, 1, S] tensor that a factor which varies along keys was repeated or transposed from."""
    while (found := shape(node)) is not None:
        if len(found) == 4 and found[1:3] == (1, 1):
            return node if found[0] in (1, sizes[0]) and found[3] == sizes[1] else None
        if op_name(node) not in _SAME_VALUES | {"repeat", "expand"}:
            return None
        before = node.args[0]
        if not isinstance(before, fx.Node):
            return None
        node = before
    return None


def _kept_keys(bias: fx.Node, batch: int | None, keys: int | None) -> fx.Node | None:
    """The bool tensor [B or 1, (1, (1,)) S] of which a bias is (1 - keep) * -large, or None."""
    node, heads_apart = bias, True
    while (shape(node) or (0,))[-1] == keys:
        name, source = op_name(node), node.args[0] if node.args else None
        if name == "repeat_interleave" and argument(node, 2, "dim") in (0, 1):
            heads_apart = True  # of B * H rows, those of one batch element are neighbours
        elif name == "repeat":
            heads_apart = False
        elif name not in _SAME_VALUES | {"view", "reshape", "unsqueeze", "expand"} and not _adds_dimensions(
            node
        ):
            break
        if not isinstance(source, fx.Node):
            return None
        node = source
    keep = _zero_where(node)
    if keep is None:
        return None
    sizes = shape(keep) or ()
    fits = 2 <= len(sizes) <= 4 and sizes[-1] == keys and all(n == 1 for n in sizes[1:-1])
    return keep if fits and (sizes[0] == 1 or (heads_apart and sizes[0] == batch)) else None


def _zero_where(bias: fx.Node) -> fx.Node | None:
    """The bool tensor that is True where a bias is 0, if it is -large everywhere else."""
    name, args = op_name(bias), bias.args
    if name == "where" and len(args) == 3 and _number(args[1]) == 0 and _is_large(args[2], HIDES):
        return args[0] if isinstance(args[0], fx.Node) and _is_bool(args[0]) else None
    if name != "mul" or len(args) != 2:
        return None
    node, factor = args if isinstance(args[0], fx.Node) else args[::-1]
    if not isinstance(node, fx.Node) or len(node.args) < 2 or _number(factor) is None:
        return None
    first, second = node.args[::-1] if op_name(node) == "rsub" else node.args[:2]
    if op_name(node) not in ("sub", "rsub"):
        return None
    minuend = isinstance(second, fx.Node)
    one, keep = (first, second) if minuend else (second, first)
    sign = 1 if minuend else -1  # (1 - keep) * -large, (keep - 1) * large
    if _number(one) != 1 or not isinstance(keep, fx.Node) or not _is_large(_number(factor) * sign, HIDES):
        return None
    source = _without(keep, _SAME_VALUES - {"bool"}, until_bool=True)
    return source if _is_bool(source) else None


def _is_frame_causal(mask: fx.Node) -> bool:
    """Whether a comparison of positions made the mask: attention is causal over blocks of frames."""
    node = _without(mask, _SAME_VALUES | _MORE_DIMENSIONS)
    return op_name(node) in ("le", "lt", "ge", "gt", "tril", "triu")


def _without(node: fx.Node, names: set[str], until_bool: bool = False) -> fx.Node:
    """The node upstream of all operations of these names."""
    while op_name(node) in names and node.args and isinstance(node.args[0], fx.Node):
        if (until_bool and _is_bool(node)) or (op_name(node) == "getitem" and not _adds_dimensions(node)):
            break
        node = node.args[0]
    return node


def _adds_dimensions(node: fx.Node) -> bool:
    """x[:, None, :] and the like."""
    index = node.args[1] if op_name(node) == "getitem" and len(node.args) > 1 else None
    items = index if isinstance(index, tuple) else (index,)
    return index is not None and all(i is None or i is Ellipsis or i == slice(None) for i in items)


def _is_bool(node: Any) -> bool:
    return is_tensor(node) and example(node).dtype == torch.bool


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_large(value: Any, bound: float) -> bool:
    return _number(value) is not None and value <= bound
