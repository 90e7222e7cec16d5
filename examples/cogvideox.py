"""CogVideoX: diffusers names no repeated blocks of it, but `enable` knows them and compiles block by block.

python examples/cogvideox.py [--tiny]
"""

from common import start

import svg_ear_compile

run = start(__doc__, "cogvideox", "zai-org/CogVideoX-5b")
run.pipe.to(run.device)
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", num_frames=49, num_inference_steps=50)
run.save(run.pipe(**call).frames[0], fps=8)
print(svg_ear_compile.report())
