"""Trains the tiny Wan model of `svg-ear demo` by flow matching on procedural scenes, in resumable legs.

    python examples/tiny_wan/train.py --minutes 8 --total-minutes 16 --out outputs/tiny_wan

A leg stops by itself after `--minutes` and writes `checkpoint.pt`; the same command then goes on where it
stopped. Learning rate and curriculum follow the share of `--total-minutes` spent so far, so legs of any
length compose. Every leg ends with `samples_*.png`, `log.json` and `export/` (the averaged weights in bf16).
Without a checkpoint but with `export/` and `log.json`, training goes on from those weights with a fresh
optimizer.

    clip x0 in [-1, 1], noise e ~ N(0, 1), s in (0, 1) logit-normal, shifted towards noise for larger clips
    x_s = (1 - s) x0 + s e,   model(x_s, 1000 s, caption) ~ e - x0 (mean squared error)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from scenes import Scenes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from svg_ear_compile.tiny_wan import NULL, TEXT_DIM, embed, load_model, sample, sentence

Size = tuple[int, int, int]  # frames, height, width in pixels

MODEL = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 128,
}
PEAK_LR = 1e-3
WARM_UP_STEPS = 200
EMA_DECAY = 0.998
SHARD_BYTES = 16_000_000


@dataclass(frozen=True)
class Plan:
    """What to train when: each size's batch and noise shift, and the sizes up to each share of training."""

    batch: dict[Size, int]
    shift: dict[Size, float]
    phases: tuple[tuple[float, dict[Size, float]], ...]  # (until this share, size: probability)
    sample_sizes: tuple[Size, ...]
    sample_steps: int = 30

    def size_at(self, progress: float, step: int) -> Size:
        weights = next((w for until, w in self.phases if progress < until), self.phases[-1][1])
        return random.Random(step).choices(list(weights), list(weights.values()))[0]


SMALL, MIDDLE, LARGE = (8, 64, 64), (16, 64, 64), (16, 128, 128)
FULL = Plan(
    batch={SMALL: 128, MIDDLE: 64, LARGE: 8},
    shift={SMALL: 2.0, MIDDLE: 2.0, LARGE: 3.0},
    phases=((0.35, {SMALL: 1}), (0.50, {MIDDLE: 1}), (1.0, {MIDDLE: 0.3, LARGE: 0.7})),
    sample_sizes=(MIDDLE, LARGE),
)
TOY_SMALL, TOY_LARGE = (2, 16, 16), (4, 16, 16)
TOY = Plan(
    batch={TOY_SMALL: 2, TOY_LARGE: 2},
    shift={TOY_SMALL: 2.0, TOY_LARGE: 2.0},
    phases=((0.5, {TOY_SMALL: 1}), (1.0, {TOY_LARGE: 1})),
    sample_sizes=(TOY_LARGE,),
    sample_steps=2,
)


@dataclass
class State:
    """What a later leg needs besides weights and optimizer. Seeds derive from `step`, so no RNG state."""

    step: int = 0
    warm_from: int = 0  # step at which the optimizer was last fresh
    seconds: float = 0.0  # trained so far, all legs
    batch: dict[Size, int] = field(default_factory=dict)
    log: list[dict[str, object]] = field(default_factory=list)


@dataclass
class Meter:
    """Loss and speed of the steps of one size since the last log line."""

    losses: list[float] = field(default_factory=list)
    clips: int = 0
    seconds: float = 0.0

    def summary(self, size: Size) -> dict[str, object]:
        loss = sum(self.losses) / max(1, len(self.losses))
        return {
            "size": "x".join(map(str, size)),
            "loss": round(loss, 5),
            "clips_per_second": round(self.clips / self.seconds, 1),
        }


def learning_rate(progress: float, steps_since_fresh: int) -> float:
    """Linear warm-up, flat until 40% of the training, then a cosine down to 2% of the peak."""
    warm = min(1.0, (steps_since_fresh + 1) / WARM_UP_STEPS)
    fall = min(1.0, max(0.0, (progress - 0.4) / 0.6))
    return PEAK_LR * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * fall)) / 2)


def flow_matching_loss(
    model: torch.nn.Module, scenes: Scenes, size: Size, count: int, shift: float, generator: torch.Generator
) -> Tensor:
    """The loss of one batch drawn from `generator`; one caption in ten is replaced by the empty one."""
    device = scenes.device
    clip, ids = scenes.batch(count, *size, generator)
    dropped = torch.rand(count, 1, generator=generator, device=device) < 0.1
    text = embed(torch.where(dropped, NULL, ids))
    noise = torch.randn(clip.shape, generator=generator, device=device)
    sigma = torch.randn(count, generator=generator, device=device).sigmoid()
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noisy = torch.lerp(clip, noise, sigma[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16):
        velocity = model(noisy, sigma * 1000, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clip)


def validation_loss(model: torch.nn.Module, scenes: Scenes, plan: Plan, size: Size) -> float:
    """Mean loss over 8 fixed batches."""
    generator = torch.Generator(scenes.device)
    count = max(1, plan.batch[size] // 2)
    with torch.no_grad():
        losses = [
            flow_matching_loss(model, scenes, size, count, plan.shift[size], generator.manual_seed(2**40 + i))
            for i in range(8)
        ]
    return torch.stack(losses).mean().item()


def attention_priority(device: torch.device) -> list[SDPBackend]:
    """SDPA backends, the one that trains fastest here first (cuDNN where it works, agrees and wins)."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return order

    def trial(backend: SDPBackend) -> tuple[float, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        for keys in (10, 16384):  # cross attention, self attention
            q = torch.randn(2, 2, 16384, 128, device=device, dtype=torch.bfloat16, generator=generator)
            k = torch.randn(2, 2, keys, 128, device=device, dtype=torch.bfloat16, generator=generator)
            q, k = q.requires_grad_(), k.requires_grad_()
            with sdpa_kernel([backend, *order], set_priority=True):
                for i in range(8):
                    if i == 3:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, k)
                    grads = torch.autograd.grad(out.float().square().sum(), (q, k))
            torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cat([out.flatten(), *(g.flatten() for g in grads)]).float()

    try:
        flash_time, flash = trial(SDPBackend.FLASH_ATTENTION)
        cudnn_time, cudnn = trial(SDPBackend.CUDNN_ATTENTION)
        error = ((cudnn - flash).norm() / flash.norm()).item()
    except RuntimeError as problem:
        print(f"attention: flash (cuDNN: {problem})", flush=True)
        return order
    print(f"attention: flash {flash_time:.3f} s, cuDNN {cudnn_time:.3f} s, differ by {error:.1e}", flush=True)
    wins = error < 0.02 and cudnn_time < 0.95 * flash_time
    return [SDPBackend.CUDNN_ATTENTION, *order] if wins else order


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` only once the block has ended well."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.args = args
        self.plan = TOY if args.toy else FULL
        self.device = torch.device(args.device)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.scenes = Scenes(self.device)
        self.generator = torch.Generator(self.device)
        config = {**MODEL, "num_layers": 1, "ffn_dim": 64} if args.toy else MODEL
        self.model = WanTransformer3DModel(**config).to(self.device)
        torch.nn.init.zeros_(self.model.proj_out.weight)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.state = State(batch=dict(self.plan.batch))
        self.resume()
        self.before = self.state.seconds
        if args.compile:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        count = sum(p.numel() for p in self.model.parameters())
        print(f"{count / 1e6:.2f}M parameters on {self.device}, from step {self.state.step}", flush=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def resume(self) -> None:
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = State(**saved["state"])
        elif (self.out / "export" / "config.json").exists() and (self.out / "log.json").exists():
            weights = WanTransformer3DModel.from_pretrained(self.out / "export", torch_dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
            self.ema.load_state_dict(weights.state_dict())
            told = json.loads((self.out / "log.json").read_text())
            self.state.step = self.state.warm_from = told["step"]
            self.state.seconds, self.state.log = told["seconds"], told["log"]

    def save(self) -> None:
        parts = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        state = {**parts, "optimizer": self.optimizer.state_dict(), "state": vars(self.state)}
        with written_whole(self.checkpoint) as path:
            torch.save(state, path)

    def train(self) -> None:
        """One leg: steps until `--minutes` are over or the whole training is."""
        args, state, total = self.args, self.state, 60 * self.args.total_minutes
        parameters, averages = list(self.model.parameters()), list(self.ema.parameters())
        self.model.train()
        bar = tqdm(total=total, initial=round(self.before), unit="s", disable=not sys.stderr.isatty())
        meters: dict[Size, Meter] = {}
        saved, skipped = time.monotonic(), 0
        steps_left = args.max_steps or 10**9
        with sdpa_kernel(attention_priority(self.device), set_priority=True):
            while steps_left:
                elapsed = time.monotonic() - self.started
                state.seconds = self.before + elapsed
                progress = state.seconds / total
                if elapsed > 60 * args.minutes or progress >= 1:
                    break
                size = self.plan.size_at(progress, state.step)
                meter = meters.setdefault(size, Meter())
                begun = time.monotonic()
                rate = learning_rate(progress, state.step - state.warm_from)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.generator.manual_seed(state.step)
                count = state.batch[size]
                try:
                    loss = flow_matching_loss(
                        self.model, self.scenes, size, count, self.plan.shift[size], self.generator
                    )
                    loss.backward()
                except torch.OutOfMemoryError:
                    if count == 1:
                        raise
                    state.batch[size] = count // 2
                    print(f"out of memory: batch {count // 2} for {size} from now on", flush=True)
                    self.optimizer.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    continue
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                if torch.isfinite(norm):
                    self.optimizer.step()
                    decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
                    torch._foreach_lerp_(averages, parameters, 1 - decay)
                    meter.losses.append(loss.item())
                else:
                    skipped += 1
                    if skipped > 100:
                        raise RuntimeError(f"{skipped} steps had a gradient that is not finite")
                self.optimizer.zero_grad(set_to_none=True)
                state.step += 1
                steps_left -= 1
                meter.clips += count
                meter.seconds += time.monotonic() - begun
                bar.update(round(state.seconds) - bar.n)
                if state.step % args.log_every == 0:
                    for size, meter in meters.items():
                        entry = {"step": state.step, "progress": round(progress, 4), "lr": rate}
                        entry |= meter.summary(size)
                        state.log.append(entry)
                        bar.write(json.dumps(entry))
                    meters.clear()
                if time.monotonic() - saved > 60:
                    self.save()
                    saved = time.monotonic()
        bar.close()
        self.save()

    def finish(self) -> None:
        """Writes the averaged weights in bf16, the log with validation losses, and sample sheets."""
        del self.model
        export = self.out / "export"
        copy.deepcopy(self.ema).to(torch.bfloat16).save_pretrained(export, max_shard_size=SHARD_BYTES)
        told = {"step": self.state.step, "seconds": self.state.seconds, "log": self.state.log}
        self.write_log(told)
        told["validation"] = {
            "x".join(map(str, size)): round(validation_loss(self.ema, self.scenes, self.plan, size), 5)
            for size in self.plan.sample_sizes
        }
        print(f"validation loss {told['validation']}", flush=True)
        self.write_log(told)
        final = load_model(self.device, torch.bfloat16, export)
        for size in self.plan.sample_sizes:
            self.write_samples(final, size)

    def write_log(self, told: dict[str, object]) -> None:
        with written_whole(self.out / "log.json") as path:
            path.write_text(json.dumps(told, indent=1))

    def write_samples(self, model: torch.nn.Module, size: Size, count: int = 6, columns: int = 8) -> None:
        """A sheet of sampled clips: one row a clip, frames side by side, its caption above."""
        import numpy as np
        from PIL import Image, ImageDraw

        generator = torch.Generator(self.device).manual_seed(7)
        ids = self.scenes.batch(count, *size, generator)[1]
        noise = torch.randn(count, 3, *size, generator=generator, device=self.device)
        clips = sample(model, noise, ids, steps=self.plan.sample_steps)
        frames, height, _ = size
        chosen = [round(i * (frames - 1) / (columns - 1)) for i in range(columns)]
        rows = clips[:, :, chosen].permute(0, 3, 2, 4, 1).flatten(2, 3)  # [count, H, columns * W, 3]
        sheet = F.pad(rows, (0, 0, 0, 0, 14, 0)).flatten(0, 1)
        image = Image.fromarray((sheet * 255).round().byte().cpu().numpy().astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for i, caption in enumerate(ids):
            draw.text((2, i * (height + 14) + 1), sentence(caption), fill=(255, 255, 255))
        image.save(self.out / f"samples_{'x'.join(map(str, size))}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Wan model in resumable legs.")
    parser.add_argument("--minutes", type=float, default=8, help="length of this leg, compiling included")
    parser.add_argument("--total-minutes", type=float, default=16, help="length of the whole training")
    parser.add_argument("--out", default="outputs/tiny_wan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--max-steps", type=int, help="end the leg after so many steps")
    parser.add_argument("--toy", action="store_true", help="a tiny model and tiny clips, to test the script")
    trainer = Trainer(parser.parse_args(argv))
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    main()
