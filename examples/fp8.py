"""Linear layers in 8 bits beside sparse attention: each speeds up what the other leaves.

python examples/fp8.py [--tiny]

Needs torchao: pip install torchao. On a GPU the weights and activations of linear layers are fp8, scaled row by row
(from compute capability 8.9 on); on a CPU weights are int8. Quantise before `enable`.
"""

import sys

from common import start

import svg_ear_compile

try:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )
except ImportError:
    sys.exit("torchao is not installed: pip install torchao")

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
run.pipe.to(run.device)
fp8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
quantize_(run.pipe.transformer.blocks, fp8 if run.device.type == "cuda" else Int8WeightOnlyConfig())
print(svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings))
call = run.call(prompt="a cat walks on the grass", height=720, width=1280, num_frames=81)
run.save(run.pipe(**call).frames[0])
print(svg_ear_compile.report())
