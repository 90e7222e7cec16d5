"""LoRA: loaded before or after `enable`, and swapped without compiling again.

python examples/lora.py [--tiny]
"""

import torch
from common import start
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import svg_ear_compile


def adapter(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random weights, in place of a file: pipe.load_lora_weights("owner/name", adapter_name="style")."""
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="made")
    weights = get_peft_model_state_dict(model, adapter_name="made")
    model.delete_adapters("made")
    return {f"transformer.{name}": weight.clone() for name, weight in weights.items()}


run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
run.pipe.to(run.device)
first, second = (adapter(run.pipe.transformer, seed) for seed in (1, 2))
run.pipe.transformer.load_lora_adapter(first, adapter_name="style")
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", height=720, width=1280, num_frames=81)
run.pipe(**call)
graphs = len(svg_ear_compile.report().graphs)
run.pipe.transformer.load_lora_adapter(second, adapter_name="style", hotswap=True)
run.save(run.pipe(**call).frames[0])
print("graphs before and after the swap:", graphs, len(svg_ear_compile.report().graphs))
print(svg_ear_compile.report())
