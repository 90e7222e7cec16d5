"""In which form does each head go? In cubes or by splits, with or without first-order terms (docs/DESIGN.md).

A trial (kernels/measuring/calls.py) tells what each form would lose on the same rows. A head goes by the one with the
smallest error, once what the form costs is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("cubes", "splits")
WORTH = 0.85
"""Making orders once in RESPLIT calls takes a tenth of a call's time (H200, 720p): an error that is so much
smaller saves more than that."""
FIRST_ORDER_WORTH = 0.9
"""The same for first-order terms: in all heads they take 4 to 6 ms of a call's 30 to 67 (H100, 720p)."""
RESPLIT = 8
"""Orders of splits are made in one sparse call of so many, and used again in the others: tokens hardly move against
each other from step to step."""


@dataclass
class HeadVariants:
    """split_heads, first_order: which heads go by splits, and get first-order terms, [H]; (): none.

    anew: whether other heads go by splits than those whose orders were kept.
    """

    is_tried: bool = False
    split_heads: tuple[bool, ...] = ()
    first_order: tuple[bool, ...] = ()

    def choose(self, sums: Tensor, orders: int, terms: bool) -> Tensor:
        """Takes what is best by the sums [orders * densities * forms,2,B,H] of a trial.

        Returns those of the choice, [densities,2,B,H].
        """
        sums = sums.unflatten(0, (max(orders, 1), -1, 1 + terms))
        order, form = best(losses(sums))
        if orders:
            self.split_heads = _heads(order)
        if terms:
            self.first_order = _heads(form)
        return sums[order, :, form, :, :, torch.arange(len(order))].permute(1, 2, 3, 0)


def losses(sums: Tensor) -> Tensor:
    """What each form of a head loses, [orders,forms,H], from sums [orders,densities,forms,2,B,H] of a trial: the
    logarithm of its squared error, of the batch together, and of several densities, since these lie far apart, the
    mean."""
    return sums[:, :, :, 0].sum(-2).clamp(min=torch.finfo(sums.dtype).tiny).log().mean(1)


def best(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(order, form) of each head, [H] int64, from losses [orders,forms,H]."""
    orders, forms, _ = losses.shape
    worth = torch.outer(
        torch.tensor([1.0, WORTH], dtype=losses.dtype, device="cpu"),
        torch.tensor([1.0, FIRST_ORDER_WORTH], dtype=losses.dtype, device="cpu"),
    )
    score = losses - 2 * worth[:orders, :forms, None].log()
    # The first of what is equal, the cheapest, where nothing is a number or everything infinite.
    chosen = score.nan_to_num(nan=math.inf, posinf=math.inf).flatten(0, 1).argmin(0)
    return chosen // forms, chosen % forms


def _heads(chosen: Tensor) -> tuple[bool, ...]:
    """[H], or () where there are none."""
    return tuple(chosen.bool().tolist()) if chosen.any() else ()
