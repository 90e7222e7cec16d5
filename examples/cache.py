"""FirstBlockCache leaves out the other blocks of a step where the first one's output has hardly changed.

python examples/cache.py [--tiny]

What is left out costs nothing, dense or sparse; what runs is sparse. Watch the quality: both errors add up.
"""

from common import start
from diffusers import FirstBlockCacheConfig

import svg_ear_compile

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
run.pipe.to(run.device)
run.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", height=720, width=1280, num_frames=81)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
