"""Wan 2.2 has two transformers, one for the first steps and one for the last: both are compiled.

python examples/wan22.py [--tiny]

The first steps that stay dense are those of the whole generation, not of each transformer.
"""

from common import start

import svg_ear_compile

run = start(__doc__, "wan22", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
if run.tiny is None:
    run.pipe.enable_model_cpu_offload()  # two times 14B
done = svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings)
for model in done.models:
    print(model.name, model.model, model.how)
call = run.call(
    prompt="a cat walks on the grass", height=720, width=1280, num_frames=81, num_inference_steps=40
)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
