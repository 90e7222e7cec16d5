"""Which heads? Some go by splits, some get first-order terms: their numbers, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of a number that a launch takes.
_WORD = 62


class Heads(NamedTuple):
    """numbers [n] int64: the chosen heads. places [H] int32: which of these a head is, -1: not chosen."""

    numbers: Tensor
    places: Tensor


def on_device(chosen: Sequence[bool], device: torch.device) -> Heads:
    """The choice goes along as arguments of launches: a CUDA graph could not record a copy from the host, and a
    copy would make the host wait. The number of launches is the same for any choice."""
    words = [chosen[i : i + _WORD] for i in range(0, len(chosen), _WORD)]
    bits = [
        torch.bitwise_right_shift(
            sum(on << h for h, on in enumerate(word)), torch.arange(len(word), device=device)
        )
        & 1
        for word in words
    ]
    is_chosen = torch.cat(bits)
    numbers = is_chosen.argsort(descending=True, stable=True)[: sum(chosen)]
    return Heads(numbers, torch.where(is_chosen > 0, is_chosen.cumsum(0) - 1, -1).int())
