"""What does an attention mask hide? Only a mask over keys, the same for all queries, fits block lists."""

from __future__ import annotations

import torch

from .match import Call
from .site import Reason
from .sizes import example, hint, shown


def read_mask(call: Call) -> tuple[str, Reason | None]:
    """(the mask in words, the reason why it keeps the site dense or None)."""
    if call.attn_mask is None:
        return "none", None
    mask = example(call.attn_mask)
    if not isinstance(mask, torch.Tensor):
        return "unknown", Reason.MASK
    sizes = [hint(size) for size in mask.shape]
    words = f"[{','.join(str(shown(size)) for size in mask.shape)}]"
    if mask.dtype != torch.bool:
        return f"bias {words} {str(mask.dtype).removeprefix('torch.')}", Reason.MASK_FLOAT
    batch, keys = hint(example(call.query).shape[0]), hint(example(call.key).shape[2])
    if len(sizes) == 4 and sizes[1:3] == [1, 1] and sizes[0] in (1, batch) and sizes[3] == keys:
        return f"key padding {words} bool", None
    return f"{words} bool", Reason.MASK
