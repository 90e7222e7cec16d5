"""How do the values of a block go with its keys?"""

from __future__ import annotations

import torch
from torch import Tensor


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
    0 for an empty block, behind the last one (columns >= Ck), and where an entry is not finite: nothing may
    come of a block with weight 0, and 0 x infinity would. float32 here; of the key's dtype on a GPU.
    """
    B, _, _, D = key.shape
    found = key.new_zeros((B, len(heads), columns, D, D), dtype=torch.float32)
    for b in range(B):
        for i, h in enumerate(heads.tolist()):
            sizes = offsets[b, h].diff()
            block = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
            k, v = (
                (x[b, h, : len(block)].float() - centroids[b, h].float()[block]).split(sizes.tolist())
                for x, centroids in ((key, key_centroids), (value, value_centroids))
            )
            for j in range(len(sizes)):
                torch.mm(k[j].mT, v[j], out=found[b, i, j])
            found[b, i, : len(sizes)] /= sizes.clamp(min=1)[:, None, None]
    return found.nan_to_num_(0, 0, 0)
