"""Which attention trains fastest on this GPU?"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention_priority(device: torch.device, masked: bool) -> list[SDPBackend]:
    """SDPA backends, the one that trains fastest here first (cuDNN where it works, agrees and wins).

    A mask of padded text rules out flash attention, and cuDNN's would be as large as all scores.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if masked or device.type != "cuda":
        return order

    def trial(backend: SDPBackend) -> tuple[float, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        for keys in (10, 16384):  # cross attention, self attention
            q = torch.randn(2, 2, 16384, 128, device=device, dtype=torch.bfloat16, generator=generator)
            k = torch.randn(2, 2, keys, 128, device=device, dtype=torch.bfloat16, generator=generator)
            q, k = q.requires_grad_(), k.requires_grad_()
            with sdpa_kernel([backend, *order], set_priority=True):
                for i in range(8):
                    if i == 3:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, k)
                    grads = torch.autograd.grad(out.float().square().sum(), (q, k))
            torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cat([out.flatten(), *(g.flatten() for g in grads)]).float()

    try:
        flash_time, flash = trial(SDPBackend.FLASH_ATTENTION)
        cudnn_time, cudnn = trial(SDPBackend.CUDNN_ATTENTION)
        error = ((cudnn - flash).norm() / flash.norm()).item()
    except RuntimeError as problem:
        print(f"attention: flash (cuDNN: {problem})", flush=True)
        return order
    print(f"attention: flash {flash_time:.3f} s, cuDNN {cudnn_time:.3f} s, differ by {error:.1e}", flush=True)
    wins = error < 0.02 and cudnn_time < 0.95 * flash_time
    return [SDPBackend.CUDNN_ATTENTION, *order] if wins else order
