"""From how many video tokens on is a sparse call faster than a dense one?

Dense attention grows with the square of the length; clustering and launches hardly do. On an H200, heads of
64 at densities of 0.1 to 0.25 lose at 7,392 tokens and win at 17,776; interpolated, they break even at 7,700
to 9,800. Heads of 128 win at all lengths that were measured, from 32,760 on. (benchmarks/attention.py; a test
holds the table against its results in benchmarks/results/attention_h200.json.)
"""

from __future__ import annotations

import torch

from .sizes import hint

MIN_TOKENS = 8192
"""Where nothing was measured."""
MEASURED: dict[tuple[int, int, int], int] = {(9, 0, 64): 10_240, (9, 0, 128): 8192}
"""By compute capability and head_dim, in bfloat16 and float16."""


def least_tokens(query: torch.Tensor) -> int:
    """For a query [B,H,L,D]."""
    is_nvidia = query.device.type == "cuda" and not torch.version.hip
    if not is_nvidia or query.dtype not in (torch.bfloat16, torch.float16):
        return MIN_TOKENS
    capability = torch.cuda.get_device_capability(query.device)
    return MEASURED.get((*capability, hint(query.shape[3]) or 0), MIN_TOKENS)
