"""Wan 2.1, text to video: sparse attention in one line.

    python examples/wan_t2v.py [--tiny]

Needs a GPU of 80 GB; with --tiny, random tiny parts on a CPU.
"""

from common import start

import svg_ear_compile

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
run.pipe.to(run.device)
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(
    prompt="a cat walks on the grass", height=720, width=1280, num_frames=81, num_inference_steps=50
)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
