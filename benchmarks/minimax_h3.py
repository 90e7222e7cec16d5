"""What is a block of MiniMax-H3 worth at its real size? Its packed sequence, compiled block by block.

    python benchmarks/minimax_h3.py [--seconds 5,10] [--densities .25,.15] [--layers 2] [--json PATH]

diffusers' own model at its published width with random bfloat16 weights, and a few of its 50 layers. The sequence is
the one that its pipeline packs for a 16:9 clip of so many seconds with a keyframe: text, the keyframe, stereo sound,
video. Nothing tells us which rows are which. A row of the table is a variant; "ms a block" is the median time of a call
of the model, without what a call without layers takes, over the number of layers. Variants take turns. "error": of what
the blocks add to the video rows, relative to Inductor. Random weights attend nearly alike to all tokens, so at low
density this error is no measure of a trained model's. A ratio is withheld where a sparse variant did not run sparse.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3 import before_denoise, modular_pipeline
from tabulate import tabulate
from torch import Tensor

import svg_ear_compile

DENSE, TEXT = "Inductor", 300
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 32, "hidden_size": 32, "ffn_dim": 64, "text_dim": 16,
    "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 4,
}  # fmt: skip


def make_model(args: argparse.Namespace, layers: int) -> Any:
    torch.manual_seed(0)
    with torch.device(args.device):
        config = TINY if args.tiny else {}
        model = MiniMaxH3Transformer3DModel(num_layers=layers, num_refiner_layers=1, **config).eval()
    return model.to(dtype(args))


def dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def make_inputs(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The arguments of a call, with the rows where diffusers' pipeline puts them."""
    height, width = (64, 96) if args.tiny else modular_pipeline.resolve_canvas_size(16, 9, 32, 768, 1032192)
    frames = modular_pipeline.align_num_frames(round(24 * seconds), 17, 5)
    latent = modular_pipeline.video_latent_num_frames(frames, 17, 5), height // 16, width // 16
    sound = modular_pipeline.audio_latent_num_frames(frames)
    positions, tags, video, audio, text, keyframe, _ = (
        before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            torch.ones(TEXT), *latent, sound, (1, 2, 2), 2, 2, 0, ("first",)
        )
    )
    noise = torch.Generator(args.device).manual_seed(0)

    def rows(count: int, channels: int) -> Tensor:
        return torch.randn(1, count, channels, device=args.device, generator=noise).to(dtype(args))

    layout = {"position_ids": positions, "token_tags": tags, "video_indices": video, "audio_indices": audio}
    step = before_denoise.MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video, audio, keyframe, 0, TEXT, 0.5, 0.4, 0.999, 1.0
    )
    layout |= {"text_indices": text, "timestep": step[0], "timestep_indices": step[1]}
    return {name: x.to(args.device) for name, x in layout.items()} | {
        "hidden_states": rows(len(video), 96), "audio_hidden_states": rows(len(audio), 32),
        "encoder_hidden_states": rows(TEXT, TINY["text_dim"] if args.tiny else 5120), "return_dict": False,
    }  # fmt: skip


def variants(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of compile_repeated_blocks, by name."""
    inner = {"inner": "eager", "min_tokens": 1} if args.tiny else {}
    ours = {
        f"svg_ear, density {density:g}": {
            "backend": "svg_ear",
            "options": {"dense_steps": 0, "density": density, "strict": True, **inner},
        }
        for density in args.densities
    }
    return {DENSE: {"backend": "eager" if args.tiny else "inductor"}} | ours


def measure(args: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """A row for each variant."""
    call = make_inputs(args, seconds)
    torch._dynamo.reset()
    times: dict[str, list[float]] = {}
    outs, runs, sparse = {}, {}, {}
    with torch.no_grad():
        without, _ = timed(make_model(args, 0), call, args)
        without = min(timed(make_model(args, 0), call, args)[0], without)
        first = make_model(args, args.layers)
        weights = first.state_dict()
        for name, how in variants(args).items():
            with torch.device("meta"):
                model = make_model(argparse.Namespace(**{**vars(args), "device": "meta"}), args.layers)
            model.load_state_dict(weights, assign=True)
            model.rope = first.rope
            model.compile_repeated_blocks(fullgraph=True, dynamic=False, **how)
            runs[name] = model
            before = svg_ear_compile.report().totals()["sparse_calls"]
            _, outs[name] = timed(model, call, args)  # compiles
            sparse[name] = svg_ear_compile.report().totals()["sparse_calls"] - before
        for _ in range(args.rounds):
            for name, model in runs.items():
                times.setdefault(name, []).append(timed(model, call, args)[0])
        base = timed(make_model(args, 0), call, args)[1]
    medians = {name: statistics.median(x) - without for name, x in times.items()}
    rows = []
    for name, median in medians.items():
        error = ((outs[name] - outs[DENSE]).float().norm() / (outs[DENSE] - base).float().norm()).item()
        right = sparse[name] == (0 if name == DENSE else args.layers)
        rows.append({
            "seconds": seconds, "rows": len(call["token_tags"]), "video": len(call["video_indices"]), "variant": name,
            "ms a block": 1e3 * median / args.layers, "error": error,
            "speed-up": medians[DENSE] / median if right else "check failed",
        })  # fmt: skip
    return rows


def timed(model: Any, call: dict[str, Any], args: argparse.Namespace) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out: Tensor = model(**call)[0]
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", default="5,10")
    parser.add_argument("--densities", default=".25,.15")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model, and nothing goes to Inductor")
    parser.add_argument("--json", type=Path, help="writes the records, hardware and versions there")
    args = parser.parse_args(argv)
    args.densities = [float(x) for x in args.densities.split(",")]
    records = []
    for seconds in args.seconds.split(","):
        records += measure(args, float(seconds))
        if args.json:
            device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
            about = {"device": device, "torch": torch.__version__, "arguments": vars(args)}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"run": about, "records": records}, indent=1, default=str) + "\n")
    print(svg_ear_compile.report())
    print(tabulate(records, headers="keys", floatfmt=".4g"))
    return records


if __name__ == "__main__":
    main()
