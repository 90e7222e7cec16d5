"""What does svg_ear cost where it computes densely? One forward of the tiny Wan model, every layer dense.

    python benchmarks/dense_overhead.py [--size 16x64x64 --rounds 20]

Plain Inductor and svg_ear take turns, block by block compiled; medians, and the median of the ratios of
neighbours. The outputs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tabulate import tabulate
from tqdm import tqdm

from svg_ear_compile import tiny_wan
from svg_ear_compile.cli import size_argument


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=size_argument, default=(16, 64, 64))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    video = torch.randn(1, 3, *args.size, device=args.device, dtype=dtype)
    text = torch.randn(1, tiny_wan.CAPTION_LENGTH, tiny_wan.TEXT_DIM, device=args.device, dtype=dtype)
    timestep = torch.tensor([500.0], device=args.device)
    models = {}
    for backend, options in (("inductor", None), ("svg_ear", {"min_tokens": 1, "dense_steps": 10**9})):
        models[backend] = tiny_wan.load_model(args.device, dtype)
        models[backend].compile_repeated_blocks(backend=backend, fullgraph=True, options=options)

    seconds: dict[str, list[float]] = {backend: [] for backend in models}
    outputs = {}
    with torch.no_grad():
        for number in tqdm(range(args.rounds + 3), desc="rounds", disable=None):
            for backend, model in models.items():
                if args.device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                outputs[backend] = model(video, timestep, text, return_dict=False)[0]
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if number >= 3:  # the first compile and warm up
                    seconds[backend].append(time.perf_counter() - start)
    same = torch.equal(outputs["inductor"], outputs["svg_ear"])
    ratio = statistics.median(b / a for a, b in zip(seconds["inductor"], seconds["svg_ear"], strict=True))
    rows = [(name, statistics.median(values) * 1e3) for name, values in seconds.items()]
    print(tabulate(rows, ("forward, every layer dense", "ms"), floatfmt=("", ".2f")))
    if not same:
        raise SystemExit("the outputs differ: no ratio is given")
    print(f"outputs bit for bit the same; svg_ear / inductor = {ratio:.4f}")


if __name__ == "__main__":
    main()
