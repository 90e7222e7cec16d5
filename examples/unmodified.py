"""A script that knows nothing of svg-ear-compile. The environment switches it on (torch 2.13 and later):

SVG_EAR=1 SVG_EAR_MIN_TOKENS=256 SVG_EAR_DENSE_STEPS=0 SVG_EAR_REPORT=1 python examples/unmodified.py
"""

import torch
from diffusers import WanTransformer3DModel

model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
    ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
).eval()  # fmt: skip
model = torch.compile(model)

with torch.no_grad():
    video, timestep, text = torch.randn(1, 4, 4, 32, 32), torch.tensor([500]), torch.randn(1, 12, 16)
    print(model(video, timestep, text, return_dict=False)[0].shape)
