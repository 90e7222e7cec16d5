"""Is this call being recorded into a CUDA graph?

A replay runs the recorded kernels on the recorded addresses, and no Python. So a recorded call reads no
tensor that an earlier call left (it may be gone, or changed, when the graph is replayed), leaves none (the
next replay writes over it), measures nothing, and does not go by what the host read of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_recorded(x: Tensor) -> bool:
    """Whether what runs on the tensor's device and current stream is recorded."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
