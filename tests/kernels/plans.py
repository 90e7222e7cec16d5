"""Random valid plans, made without the kernels' own clustering, probe, routing or permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan, block_counts

UNSPECIFIED = -1  # in kept_blocks from kept_count on


def random_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seed: int = 0,
    equal: bool = True,
    keep: float = 0.3,
    num_text: int = 0,
    text_first: bool = False,
    valid: Tensor | None = None,
    compensate: bool = True,
) -> SparsePlan:
    """A plan for query, key, value [B,H,L,D] with random orders, blocks, kept blocks and biases.

    equal: video blocks are tiles of 128 queries and 64 keys, the last of each ragged and, where keys are
    masked, the rest empty; otherwise of any size, with empty blocks and single tokens among them.
    keep: chance of a video block pair to be exact; 1.0 keeps every non-empty key block.
    valid: [B,L] bool, the keys that may be seen. compensate: skipped blocks get a bias of log n_j plus a
    random gap, except that one in ten is dropped; otherwise all are.
    """
    B, H, L, _ = query.shape
    random = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, L, dtype=torch.bool) if valid is None else valid.cpu()
    (vq, tq), (vk, tk) = block_counts(L, num_text, "cubes")
    if not equal:
        vq, vk = (L - num_text) // 50 + 2, (L - num_text) // 20 + 3

    everyone = torch.ones(B, L, dtype=torch.bool)
    query_order, query_offsets = _blocks(
        everyone, H, num_text, text_first, equal, vq, tq, QUERY_BLOCK, random
    )
    key_order, key_offsets = _blocks(valid, H, num_text, text_first, equal, vk, tk, KEY_BLOCK, random)

    sizes = key_offsets.diff(dim=-1)[:, :, None, :]  # [B,H,1,Ck]
    kept = torch.rand(B, H, vq + tq, vk + tk, generator=random) < keep
    kept[:, :, vq:] = True
    kept[:, :, :, vk:] = True
    kept &= sizes > 0
    bias = sizes.double().log() + torch.rand(kept.shape, generator=random)
    dropped = torch.rand(kept.shape, generator=random) < (0.1 if compensate else 2.0)
    bias = bias.float().masked_fill(kept | dropped, -torch.inf)
    kept_blocks = torch.full(kept.shape, UNSPECIFIED)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(vq + tq)):
        indices = kept[b, h, i].nonzero()[:, 0]
        kept_blocks[b, h, i, : len(indices)] = indices

    key_p, value_p = (_permuted(x, key_order, key_offsets) for x in (key, value))

    def ints(x: Tensor) -> Tensor:
        return x.to(query.device, torch.int32).contiguous()

    return SparsePlan(
        key_p, value_p, ints(query_order), ints(query_offsets), ints(key_order), ints(key_offsets),
        _means(key_p, key_offsets), _means(value_p, key_offsets), bias.to(query.device),
        ints(kept.sum(-1)), ints(kept_blocks),
        _means(_permuted(query, query_order, query_offsets), query_offsets),
    )  # fmt: skip


def _blocks(
    valid: Tensor, H: int, num_text: int, text_first: bool, equal: bool, video: int, text: int, tile: int,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(order [B,H,L], offsets [B,H,video+text+1]), int64, on the CPU."""
    B, L = valid.shape
    is_text = torch.arange(L) < num_text if text_first else torch.arange(L) >= L - num_text
    orders, offsets = [], []
    for b in range(B):
        for _ in range(H):
            shuffled = torch.randperm(L, generator=random)
            groups = [
                shuffled[(valid[b] & ~is_text)[shuffled]],
                shuffled[(valid[b] & is_text)[shuffled]],
                shuffled[~valid[b][shuffled]],
            ]
            n, n_text = len(groups[0]), len(groups[1])
            if equal:
                starts = (torch.arange(video) * tile).clamp(max=n)
            else:  # of any size: equal starts make empty blocks, starts one apart single tokens
                starts = torch.randint(0, n + 1, (video,), generator=random)
                starts[1::5] = (starts[0::5] + 1).clamp(max=n)[: len(starts[1::5])]
                starts[2::7] = starts[0]
                starts = starts.sort().values
                starts[0] = 0
            text_starts = n + (torch.arange(text) * tile).clamp(max=n_text)
            orders.append(torch.cat(groups))
            offsets.append(torch.cat([starts, text_starts, torch.tensor([n + n_text])]))
    return torch.stack(orders).view(B, H, L), torch.stack(offsets).view(B, H, -1)


def _permuted(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """x in block order, zero after the last block."""
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            n = int(offsets[b, h, -1])
            out[b, h, :n] = x[b, h, order[b, h, :n].to(x.device)]
    return out


def _means(x: Tensor, offsets: Tensor) -> Tensor:
    """Block means by float64 sums, rounded to x's dtype."""
    B, H, _, D = x.shape
    C = offsets.shape[-1] - 1
    out = torch.zeros(B, H, C, D, dtype=x.dtype, device=x.device)
    for b in range(B):
        for h in range(H):
            starts = offsets[b, h].tolist()
            sizes = offsets[b, h].diff().to(x.device)
            owner = torch.repeat_interleave(torch.arange(C, device=x.device), sizes)
            sums = torch.zeros(C, D, dtype=torch.float64, device=x.device)
            sums.index_add_(0, owner, x[b, h, starts[0] : starts[-1]].double())
            out[b, h] = (sums / sizes.clamp(min=1)[:, None]).to(x.dtype)
    return out
