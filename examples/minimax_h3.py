"""MiniMax-H3: text, sound and video in one packed sequence. Which rows are video is read off each call.

    python examples/minimax_h3.py [--tiny]

Its transformer alone is 62 GB; with --tiny, random tiny parts on a CPU.
"""

from common import start

import svg_ear_compile

run = start(__doc__, "minimax_h3", "MiniMaxAI/MiniMax-H3", workflow="t2va")
run.pipe.to(run.device)
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", num_frames=124, num_inference_steps=50, output="videos")
run.save(run.pipe(**call)[0], fps=24)
print(svg_ear_compile.report())
