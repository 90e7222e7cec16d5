"""How do the values of a block vary with its keys, and how much does each block weigh?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..plan import term_blocks


def covariances(
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    heads: Tensor,
    columns: int,
) -> Tensor:
    """C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T of each key block: [B,heads,columns,D,D].

    key, value [B,H,L,D] in block order, offsets [B,H,Ck+1], centroids [B,H,Ck,D], heads [n]: which of the H.
    0 for an empty block, after the last one (columns >= Ck), and where an entry is not finite: a block of weight
    0 must add nothing, and 0 x infinity would. float32 here; the key's dtype on a GPU.
    """
    (B, _, _, D), Ck = key.shape, key_centroids.shape[2]
    found = key.new_empty((B, len(heads), columns, D, D), dtype=torch.float32)
    found[:, :, Ck:] = 0
    for b in range(B):
        for i, h in enumerate(heads.tolist()):
            sizes = offsets[b, h].diff()
            count = sizes.clamp(min=1)[:, None, None]
            after = torch.arange(int(sizes.max()), device=sizes.device) >= sizes[:, None]
            k, v = (
                _blocks(x[b, h], sizes.tolist()).float() - centroids[b, h].float()[:, None]
                for x, centroids in ((key, key_centroids), (value, value_centroids))
            )
            if after.any():
                k, v = (x.masked_fill_(after[..., None], 0) for x in (k, v))
            torch.bmm((k / count).mT, v, out=found[b, i, :Ck])
    return found.nan_to_num_(0, 0, 0)


def _blocks(rows: Tensor, sizes: list[int]) -> Tensor:
    """The first rows [sum(sizes),D] as blocks [C,max(sizes),D], filled up with zeros."""
    rows = rows[: sum(sizes)]
    if min(sizes) == max(sizes):  # a view takes no time, and padding a third of all that covariances take
        return rows.view(len(sizes), sizes[0], rows.shape[-1])
    return pad_sequence(rows.split(sizes), batch_first=True)


def weights(
    queries: Tensor, bias: Tensor, key_centroids: Tensor, heads: Tensor, scale: float, columns: int
) -> Tensor:
    """scale mean_{i in g} softmax_j(scale q_i.kc_j + bias_ij), for groups g of term_blocks(m) rows.

    [B,heads,groups,columns], float32 here, of the keys' dtype on a GPU.

    queries [B,H,m,D], bias [B,H,m,Ck] float32, key_centroids [B,H,Ck,D], heads [n]: which of the H. The mean leaves out
    rows where nothing is skipped or anything is not finite; 0 if it leaves out all, and after the last block.
    """
    q, k = (x[:, heads].float() for x in (queries, key_centroids))
    shares = torch.softmax(scale * q @ k.mT + bias[:, heads], dim=-1).nan_to_num_(0)
    group = term_blocks(shares.shape[2])
    shares = F.pad(shares, (0, columns - bias.shape[-1], 0, -shares.shape[2] % group))
    groups = shares.unflatten(2, (-1, group))
    skips = groups.any(-1).sum(-1, keepdim=True).clamp(min=1)
    return scale * groups.sum(3) / skips
