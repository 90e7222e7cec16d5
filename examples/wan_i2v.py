"""Wan 2.1, image to video. The image goes in by cross attention, which stays dense.

python examples/wan_i2v.py [--tiny]
"""

from common import start
from PIL import Image

import svg_ear_compile

run = start(__doc__, "wan_i2v", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers")
run.pipe.to(run.device)
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
image = Image.linear_gradient("L").convert("RGB").resize((1280, 720))  # your picture: Image.open(path)
call = run.call(image=image, prompt="the sun rises", height=720, width=1280, num_frames=81)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
