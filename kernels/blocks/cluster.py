"""Which tokens lie together in one block? Permutations of tokens into query and key blocks.

There are two families (docs/DESIGN.md): equal tiles of `block` tokens (orders "cubes" and "splits"), and clusters
of any size, which may be empty ("kmeans"). Slots hold the video tokens first, then the text tokens in their own
order, then the masked tokens. Every shape follows from the lengths, nothing is read back from the device, and no
operation is atomic: the same input gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import heads
from ..papers.kmeans import kmeans
from .cubes import cubes
from .places import Places
from .splits import splits

# context.Memo.remember
Remember = Callable[[torch.device, Hashable, Callable[[], Any]], Any]


class Blocks(NamedTuple):
    """order [B,H,L] int32 and offsets [B,H,C+1] int32, as in SparsePlan; contiguous."""

    order: Tensor
    offsets: Tensor


def make_blocks(
    x: Tensor,
    valid: Tensor | None,
    counts: tuple[int, int],
    block: int,
    carried: Tensor | None,
    num_text: int,
    text_first: bool,
    order: str,
    grids: Sequence[tuple[int, ...]],
    seed: int,
    split_heads: Sequence[bool] = (),
    remember: Remember | None = None,
    places: Places | None = None,
) -> tuple[Blocks, Tensor | None]:
    """Puts the tokens of x [B,H,L,D] into counts = (video, text) blocks. Text blocks come last.

    valid: [B,L] bool, False for masked tokens, which belong to no block; None when there are none.
    block: tokens of an equal tile; text is cut into tiles in every order. carried: what the last call
    returned as its second value, to go on from (kmeans) or to use again (splits); None: nothing. grids:
    (frames, height, width) of the video tokens, of several videos one after another; (): not known. split_heads [H]:
    with the order "auto" and grids, which heads go by splits. remember: keeps the order of cubes, which depends on no
    tensor's values, for the next call. places: where video and text tokens lie, if not in one stretch each.
    Returns the blocks and what to carry on: for "kmeans" the centroids [B,H,C,D] float32, for heads that go
    by splits the order of their tokens [B,heads,L] int32.
    """
    remember = remember or _make
    B, H, L, _ = x.shape
    n, first, device = L - num_text, num_text if text_first else 0, x.device
    lies = slice(first, first + n) if places is None else places.video
    seen = None if valid is None else valid[:, lies]

    def with_text(video: Tensor) -> Tensor:
        """Slot -> token of all, from the numbers [B or 1, H or 1, n] of video tokens in the order of their slots."""
        if places is None:
            text = torch.arange(num_text, device=device) + (0 if text_first else n)
            video = video + first
        else:
            text, video = places.other, places.video[video]
        return torch.cat([video, text.expand(*video.shape[:2], num_text)], dim=-1)

    def offsets(ends: Tensor | None = None) -> Tensor:
        """ends: where the blocks of video tokens end, if they are not tiles."""
        n_video: int | Tensor = n
        n_text: int | Tensor = num_text
        if valid is not None and seen is not None:
            n_video = seen.sum(-1).view(B, 1, 1)
            n_text = valid.sum(-1).view(B, 1, 1) - n_video
        of_video = _tile_offsets(counts[0], block, n_video, device) if ends is None else ends
        of_text = of_video[..., -1:] + _tile_offsets(counts[1], block, n_text, device)[..., 1:]
        of_video = of_video.expand(*of_text.shape[:2], -1)
        return _of_heads(torch.cat([of_video, of_text], dim=-1), B, H)

    if order == "kmeans":
        arranged, ends, centroids = kmeans(x[:, :, lies], seen, counts[0], carried, seed)
        tokens = with_text(arranged)
        return Blocks(
            _of_heads(tokens if valid is None else _masked_last(tokens, valid), B, H), offsets(ends)
        ), centroids
    if order not in ("auto", "cubes", "splits"):
        raise ValueError(f"unknown order {order!r}")

    grids = tuple(grids)
    everywhere = order == "splits" or not grids
    named = (grids, L, num_text, text_first, B, H, places and places.name)
    if places is not None and places.name is None:  # nothing says that they are the same in the next call
        remember = _make
    state: Tensor | None = None
    numbers: Tensor | None = None
    if everywhere or (order == "auto" and any(split_heads)):
        if not everywhere:
            chosen = tuple(split_heads)
            numbers = remember(device, ("heads", chosen), lambda: heads.on_device(chosen, device)).numbers
        state, count = carried, H if numbers is None else len(numbers)
        if state is None or state.shape != (B, count, L) or state.device != device:
            some = x if numbers is None else x.index_select(1, numbers)
            state = _of_heads(with_text(splits(some[:, :, lies], seen, block)), B, count)

    def boxes() -> Tensor:
        return with_text(remember(device, grids, lambda: _of_grids(grids, device).view(1, 1, n)))

    if numbers is not None and state is not None:
        tokens = remember(device, named, lambda: _of_heads(boxes(), B, H)).index_copy(1, numbers, state)
    elif state is not None:
        tokens = state
    elif valid is None:
        tokens = remember(device, named, lambda: _of_heads(boxes(), B, H))
    else:
        tokens = boxes()
    if valid is not None:
        return Blocks(_of_heads(_masked_last(tokens.long(), valid), B, H), offsets()), state
    return Blocks(tokens, remember(device, (*named, block), offsets)), state


def _of_grids(grids: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """`cubes` of each grid, one after another."""
    sizes = [math.prod(grid) for grid in grids]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([cubes(grid, device) + first for grid, first in zip(grids, firsts, strict=True)])


def _make(device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
    """remember() of nothing."""
    return make()


def _of_heads(x: Tensor, B: int, H: int) -> Tensor:
    """[B or 1, H or 1, ...] of every head, int32, contiguous."""
    return x.to(torch.int32).expand(B, H, -1).contiguous()


def _masked_last(tokens: Tensor, valid: Tensor) -> Tensor:
    """slot -> token [B or 1, H or 1, L]: masked tokens after all others, each group in the order that it had."""
    tokens = tokens.expand(len(valid), -1, -1)
    seen = valid[:, None].expand(tokens.shape).gather(-1, tokens)
    through = seen.cumsum(-1)
    slot = torch.arange(tokens.shape[-1], device=tokens.device)
    slot = torch.where(seen, through - 1, through[..., -1:] + slot - through)
    # Slots are distinct, so the order of the writes does not matter.
    return torch.empty_like(slot).scatter_(-1, slot, tokens)


def _tile_offsets(count: int, block: int, tokens: int | Tensor, device: torch.device) -> Tensor:
    """min(j * block, tokens) for j = 0..count: [1,1,count+1], or [B,1,count+1] for tokens [B,1,1]."""
    ends = (torch.arange(count + 1, device=device) * block).view(1, 1, -1)
    return ends.clamp(max=tokens) if isinstance(tokens, int) else torch.minimum(ends, tokens)
