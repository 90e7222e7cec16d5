"""Several GPUs share the tokens of one clip by Ulysses attention; each computes its heads sparsely.

    torchrun --nproc-per-node 2 examples/ulysses.py [--tiny]

The number of heads must be a multiple of the number of GPUs (40 in Wan 14B).
"""

import torch
import torch.distributed as dist
from common import start
from diffusers import ContextParallelConfig

import svg_ear_compile

run = start(__doc__, "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
dist.init_process_group("gloo" if run.tiny else "nccl")
rank, ranks = dist.get_rank(), dist.get_world_size()
if run.tiny is None:
    torch.cuda.set_device(rank)
    run.pipe.to(f"cuda:{rank}")
with run.accelerators(ranks):
    run.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
done = svg_ear_compile.enable(run.pipe, quality="balanced", **run.settings)
call = run.call(prompt="a cat walks on the grass", height=720, width=1280, num_frames=81)
clip = run.pipe(**call, generator=torch.Generator().manual_seed(0)).frames[0]  # the same noise on all
if rank == 0:
    print(done)
    run.save(clip)
    print(svg_ear_compile.report())
svg_ear_compile.report().print_ranks()  # of all, on rank 0
dist.destroy_process_group()
