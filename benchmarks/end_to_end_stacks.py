"""What else speeds up a pipeline, or changes it, beside sparse attention? Each applied as its users do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def fp8(pipe: Any) -> None:
    """Linear layers of the blocks in fp8, weights and activations scaled row by row; int8 weights on a CPU."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    on_cpu = pipe.transformer.device.type == "cpu"
    config = (
        Int8WeightOnlyConfig()
        if on_cpu
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    )
    blocks = next(x for x in pipe.transformer.children() if isinstance(x, torch.nn.ModuleList))
    quantize_(blocks, config)


def cache(pipe: Any) -> None:
    """FirstBlockCache: a step is left out where the first block's output has changed by less than 5%."""
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))


def lora(pipe: Any) -> None:
    """An adapter of rank 16 on the projections of attention."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights=False))


STACKS: dict[str, Callable[[Any], None]] = {"fp8": fp8, "cache": cache, "lora": lora}
