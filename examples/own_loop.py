"""A sampling loop of your own: say how many steps it has, and how often it calls the model in each.

python examples/own_loop.py [--tiny]

Inside a diffusers pipeline both are read off its loop. Here they tell where the first 10% of the steps end, and which
calls are the ones without a caption.
"""

from itertools import pairwise

import torch
from common import start

import svg_ear_compile

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
model = run.pipe.transformer.to(run.device)
print(svg_ear_compile.enable(model, quality="balanced", **run.settings))

steps, guidance = 10, 5.0
size = (3, 32, 32) if run.tiny else (21, 60, 104)
options = {"device": run.device, "dtype": model.dtype}
latents = torch.randn(1, model.config.in_channels, *size, **options)
caption, empty = (torch.randn(1, 8, model.config.text_dim, **options) for _ in range(2))  # of a text encoder
sigmas = torch.linspace(1, 0, steps + 1).tolist()
with svg_ear_compile.generation(num_steps=steps, branches=2):
    for sigma, following in pairwise(sigmas):
        time = torch.tensor([1000 * sigma], device=run.device)
        guided, plain = (model(latents, time, text, return_dict=False)[0] for text in (caption, empty))
        latents = latents + (following - sigma) * (plain + guidance * (guided - plain))
print("latents", tuple(latents.shape))
print(svg_ear_compile.report())
