"""A model larger than the GPU: blocks wait in CPU memory and come when it is their turn.

python examples/offload.py [--tiny]

Groups of whole blocks keep attention in the graphs. With enable_sequential_cpu_offload() or offload_type="leaf_level"
each linear layer is moved by itself, graphs end there, and `enable` leaves the model as it is.
"""

import torch
from common import start

import svg_ear_compile

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
for part in ("text_encoder", "vae"):
    getattr(run.pipe, part).to(run.device)
run.pipe.transformer.enable_group_offload(
    onload_device=run.device, offload_device=torch.device("cpu"), offload_type="block_level",
    num_blocks_per_group=1, use_stream=run.device.type == "cuda",
)  # fmt: skip
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", height=720, width=1280, num_frames=81)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
