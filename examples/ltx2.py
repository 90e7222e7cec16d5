"""LTX-2: video with sound. Attention over sound, and between sound and video, stays dense.

python examples/ltx2.py [--tiny]
"""

from common import start

import svg_ear_compile

run = start(__doc__, "ltx2", "Lightricks/LTX-2")
if run.tiny is None:
    run.pipe.enable_model_cpu_offload()
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat purrs", height=1024, width=1536, num_frames=121, num_inference_steps=40)
run.save(run.pipe(**call).frames[0], fps=24)
print(svg_ear_compile.report())
