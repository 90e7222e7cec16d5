"""How does a call that skips nothing run? And which keys does its mask show?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import capture, context
from .constants import OWN_CALL


def like_output(query: Tensor) -> Tensor:
    """An uninitialised [B,H,L,D] tensor that lies as [B,L,H,D] in memory."""
    B, H, L, D = query.shape
    return query.new_empty((B, L, H, D)).transpose(1, 2)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(scale query key^T + mask) value, by the call that the model itself made."""
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    _, H, L, D = query.shape
    # Some implementations return the layout of the query.
    return out if out.stride() == (H * L * D, D, H * D, 1) else like_output(query).copy_(out)


def _seen_keys(attn_mask: Tensor, site: int) -> int | None:
    """How many keys a mask shows if it shows the first ones, and as many in each batch element; else None.

    A mask is read at most once per call: svg_ear_compile/runtime/key_padding.py knows masks from earlier calls.
    """
    call = context.current()
    number = call.decisions.mask_ids.get(site, site)
    if capture.is_recorded(attn_mask):  # a replay's mask may be another one
        return None
    if site == OWN_CALL:
        return read_seen_keys(attn_mask)
    known = call.memo.seen_keys
    if number not in known:
        known[number] = read_seen_keys(attn_mask)
    return known[number]


def read_seen_keys(attn_mask: Tensor) -> int | None:
    """The same, read from the device. Waits for it."""
    shown = attn_mask[:, 0, 0, :]
    counts = shown.sum(-1, keepdim=True)
    is_first = shown == (torch.arange(shown.shape[-1], device=shown.device) < counts[:1])
    return int(torch.where(is_first.all(), counts[0, 0], 0)) or None


def drop_noop_mask(attn_mask: Tensor | None, site: int) -> Tensor | None:
    """None where the mask hides nothing."""
    if attn_mask is None or _seen_keys(attn_mask, site) == attn_mask.shape[-1]:
        return None
    return attn_mask


def dense_keys(
    key: Tensor, value: Tensor, attn_mask: Tensor | None, site: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """key, value and mask for dense attention. Where the mask shows just the first keys, the others are cut off
    instead, because kernels without a mask are faster."""
    seen = None if attn_mask is None else _seen_keys(attn_mask, site)
    if seen is None:
        return key, value, attn_mask
    return key[:, :, :seen], value[:, :, :seen], None
