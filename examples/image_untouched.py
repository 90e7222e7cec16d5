"""A pipeline that makes images: `enable` says that there is nothing to do, and changes nothing.

python examples/image_untouched.py [--tiny]
"""

from common import start

import svg_ear_compile

run = start(__doc__, "flux", "black-forest-labs/FLUX.1-dev")
run.pipe.to(run.device)
print(svg_ear_compile.enable(run.pipe))
call = run.call(prompt="a cat", num_inference_steps=28)
print("made", type(run.pipe(**call).images[0]).__name__)
print(svg_ear_compile.report())
