"""Is this call being recorded into a CUDA graph?

A replay runs the recorded kernels on the recorded addresses, and no Python. So a recorded call
- reads no tensor that an earlier call left: it may be gone or changed at the replay;
- leaves no tensor: the next replay would overwrite it;
- measures nothing, and does not rely on anything that the host read from a tensor.

And nothing can be read from the device while a graph is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_recorded(x: Tensor) -> bool:
    """Whether what runs on the tensor's device and current stream is recorded."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
