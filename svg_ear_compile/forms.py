"""In which form does each head go? In cubes or by splits, without or with first-order terms (docs/DESIGN.md).

A trial (kernels/measuring.py) tells what each form would lose on the same rows. A head goes by the one with
the smallest error, once what the form costs is counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ORDERS = ("cubes", "splits")
WORTH = 0.85
"""Making orders once in RESPLIT calls takes a tenth of a call's time (H200, 720p): an error that is so much
smaller saves more than that."""
FIRST_ORDER_WORTH = 0.9
"""The same for first-order terms: in all heads they take 4 to 6 ms of a call's 30 to 67 (H100, 720p)."""


def losses_of(sums: Tensor) -> Tensor:
    """What each form of a head loses, [orders,forms,H], from sums [orders,densities,forms,2,B,H] of a trial:
    the logarithm of its squared error, of the batch together, and of several densities, since these lie far
    apart, the mean."""
    return sums[:, :, :, 0].sum(-2).clamp(min=torch.finfo(sums.dtype).tiny).log().mean(1)


def choose(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(order, form) of each head, [H] int64, from losses [orders,forms,H]."""
    orders, forms, _ = losses.shape
    worth = torch.outer(torch.tensor([1.0, WORTH]), torch.tensor([1.0, FIRST_ORDER_WORTH]))
    score = losses - 2 * worth[:orders, :forms, None].log()
    # The first of what is equal, the cheapest, where nothing is a number or everything infinite.
    best = score.nan_to_num(nan=math.inf, posinf=math.inf).flatten(0, 1).argmin(0)
    return best // forms, best % forms


def heads_of(chosen: Tensor) -> tuple[bool, ...]:
    """[H], or () where there are none."""
    return tuple(chosen.bool().tolist()) if chosen.any() else ()
