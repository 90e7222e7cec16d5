"""A diffusers model, compiled whole: naming the backend is all there is to it.

    SVG_EAR_REPORT=1 python examples/whole_model.py

A Wan transformer with random weights and 1,024 video tokens; real models need none of these options.
"""

import torch
from diffusers import WanTransformer3DModel

model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
    ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
).eval()  # fmt: skip
options = {"min_tokens": 256, "dense_steps": 0, "density": 0.25}
compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)

with torch.no_grad():
    inputs = torch.randn(1, 4, 4, 32, 32), torch.tensor([500]), torch.randn(1, 12, 16)
    dense = model(*inputs, return_dict=False)[0]
    sparse = compiled(*inputs, return_dict=False)[0]
print(f"relative difference to dense attention: {((sparse - dense).norm() / dense.norm()).item():.4f}")
