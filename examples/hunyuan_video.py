"""HunyuanVideo: text and video tokens share one attention; text is always exact.

python examples/hunyuan_video.py [--tiny]
"""

from common import start

import svg_ear_compile

run = start(__doc__, "hunyuan_video", "hunyuanvideo-community/HunyuanVideo")
run.pipe.to(run.device)
run.pipe.vae.enable_tiling()
print(svg_ear_compile.enable(run.pipe, quality="high", **run.settings))
call = run.call(
    prompt="a cat walks on the grass", height=720, width=1280, num_frames=129, num_inference_steps=50
)
run.save(run.pipe(**call).frames[0], fps=24)
print(svg_ear_compile.report())
