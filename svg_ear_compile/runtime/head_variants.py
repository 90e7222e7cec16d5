"""Which variant does each head use? Cubes or splits, with or without first-order terms (docs/DESIGN.md).

A trial (kernels/measuring/calls.py) measures the error of each variant on the same rows. A head uses the one with the
smallest error, after the cost of the variant is taken into account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("cubes", "splits")
WORTH = 0.85
"""Splits are used if they reduce the error to this share: making their orders once in RESPLIT calls takes a tenth of a
call's time (H200, 720p), and an error that much smaller saves more."""
FIRST_ORDER_WORTH = 0.9
"""The same for first-order terms: in all heads they take 4 to 6 ms of a call's 30 to 67 (H100, 720p)."""
RESPLIT = 8
"""Orders of splits are made in one of this many sparse calls and reused in the others: tokens hardly move relative to
each other from step to step."""


@dataclass
class HeadVariants:
    """The choice of one layer. split_heads, first_order: the heads that use each, [H]; () if none do.

    first_order is None until there is a choice: most heads use terms, so till then all do.
    """

    is_tried: bool = False
    split_heads: tuple[bool, ...] = ()
    first_order: tuple[bool, ...] | None = None

    def choose(self, sums: Tensor, orders: int, terms: bool) -> Tensor:
        """Chooses the best variant of each head from the sums [orders * densities * forms,2,B,H] of a trial.

        Returns the sums of the chosen variants, [densities,2,B,H].
        """
        sums = sums.unflatten(0, (max(orders, 1), -1, 1 + terms))
        order, form = best(losses(sums))
        if orders:
            self.split_heads = _heads(order)
        if terms:
            self.first_order = _heads(form)
        return sums[order, :, form, :, :, torch.arange(len(order))].permute(1, 2, 3, 0)


def losses(sums: Tensor) -> Tensor:
    """The loss of each variant of a head, [orders,forms,H], from the sums [orders,densities,forms,2,B,H] of a trial.

    That is the logarithm of the squared error of the whole batch, averaged over densities, whose errors differ widely.
    """
    return sums[:, :, :, 0].sum(-2).clamp(min=torch.finfo(sums.dtype).tiny).log().mean(1)


def best(losses: Tensor) -> tuple[Tensor, Tensor]:
    """(order, form) of each head, [H] int64, from losses [orders,forms,H]."""
    orders, forms, _ = losses.shape
    worth = torch.outer(
        torch.tensor([1.0, WORTH], dtype=losses.dtype, device="cpu"),
        torch.tensor([1.0, FIRST_ORDER_WORTH], dtype=losses.dtype, device="cpu"),
    )
    score = losses - 2 * worth[:orders, :forms, None].log()
    # argmin takes the first of equals: the cheapest variant, if all losses are NaN or infinite.
    chosen = score.nan_to_num(nan=math.inf, posinf=math.inf).flatten(0, 1).argmin(0)
    return chosen // forms, chosen % forms


def _heads(chosen: Tensor) -> tuple[bool, ...]:
    """[H], or () if there are none."""
    return tuple(chosen.bool().tolist()) if chosen.any() else ()
