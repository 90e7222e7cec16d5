"""Trains one of the tiny models (`kinds.py`) by flow matching on procedural scenes, in resumable legs.

    python examples/tiny_wan/train.py --model wan --minutes 8 --total-minutes 16

A leg stops by itself after `--minutes` and writes `checkpoint.pt`; the same command then goes on where it
stopped. Learning rate and clip sizes follow the share of `--total-minutes` spent so far, so legs of any
length compose. Every leg ends with `samples_*.png`, `log.json` and `export/` (the averaged weights in bf16).
Without a checkpoint but with `export/` and `log.json`, a new training of `--total-minutes` starts from those
weights.

    clip x0 in [-1, 1], noise e ~ N(0, 1), s in (0, 1)
    x_s = (1 - s) x0 + s e,   model(x_s, 1000 s, caption) ~ e - x0 (mean squared error)

In pixel space the layout of a scene is decided at s > 0.9. So s is logit-normal, moved up by
`tiny_wan.noise_shift` of the clip's size; one in four is uniform. Single frames and clips of 4 frames teach
what things look like at the full resolution for a fraction of the cost of 16 frames.
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
from kinds import KINDS, Kind, compile_blocks
from scenes import Scenes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from svg_ear_compile.tiny_wan import NULL, noise_shift, sample, sentence

Size = tuple[int, int, int]  # frames, height, width in pixels

PEAK_LR = 1.5e-3
WARM_UP_STEPS = 100
EMA_DECAY = 0.998
SHARD_BYTES = 16_000_000
VALIDATED_AT = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # noise levels s


@dataclass(frozen=True)
class Plan:
    """What to train when: each size's batch, and the sizes up to each share of the training."""

    batch: dict[Size, int]
    phases: tuple[tuple[float, dict[Size, float]], ...]  # (until this share, size: probability)
    sample_sizes: tuple[Size, ...]
    sample_steps: int = 30

    def size_at(self, progress: float, step: int) -> Size:
        weights = next((w for until, w in self.phases if progress < until), self.phases[-1][1])
        return random.Random(step).choices(list(weights), list(weights.values()))[0]


IMAGE, SHORT, SMALL, LARGE = (1, 128, 128), (4, 128, 128), (16, 64, 64), (16, 128, 128)
FULL = Plan(
    batch={IMAGE: 128, SHORT: 32, SMALL: 32, LARGE: 8},  # equally many tokens
    phases=(
        (0.3, {IMAGE: 0.6, SHORT: 0.2, SMALL: 0.2}),
        (0.6, {IMAGE: 0.2, SHORT: 0.4, SMALL: 0.4}),
        (1.0, {IMAGE: 0.1, SHORT: 0.3, SMALL: 0.2, LARGE: 0.4}),
    ),
    sample_sizes=(SMALL, LARGE),
)
TOY_SMALL, TOY_LARGE = (2, 16, 16), (4, 16, 16)
TOY = Plan(
    batch={TOY_SMALL: 2, TOY_LARGE: 2},
    phases=((0.5, {TOY_SMALL: 1}), (1.0, {TOY_LARGE: 1})),
    sample_sizes=(TOY_LARGE,),
    sample_steps=2,
)


@dataclass
class State:
    """What a later leg needs besides weights and optimizer. Seeds derive from `step`, so no RNG state."""

    step: int = 0
    seconds: float = 0.0  # trained so far, all legs
    fresh_step: int = 0  # step and seconds at which this training began: with a fresh optimizer
    fresh_seconds: float = 0.0
    batch: dict[Size, int] = field(default_factory=dict)
    log: list[dict[str, object]] = field(default_factory=list)


def learning_rate(progress: float, steps_since_fresh: int) -> float:
    """Linear warm-up, flat until 40% of the training, then a cosine down to 2% of the peak."""
    warm = min(1.0, (steps_since_fresh + 1) / WARM_UP_STEPS)
    fall = min(1.0, max(0.0, (progress - 0.4) / 0.6))
    return PEAK_LR * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * fall)) / 2)


def noise_levels(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """s of `count` clips: [count] in (0, 1); one in four uniform, the others logit-normal, moved up."""
    device, shift = generator.device, noise_shift(*size)
    normal = torch.randn(count, generator=generator, device=device).sigmoid()
    uniform = torch.rand(count, generator=generator, device=device)
    flat = torch.rand(count, generator=generator, device=device) < 0.25
    return torch.where(flat, uniform, shift * normal / (1 + (shift - 1) * normal))


def flow_matching_loss(
    kind: Kind, model: nn.Module, scenes: Scenes, size: Size, count: int, generator: torch.Generator,
    level: float | None = None,
) -> Tensor:  # fmt: skip
    """The loss of one batch drawn from `generator`; one caption in ten is replaced by the empty one.

    level: the noise level s of all clips, instead of `noise_levels`.
    """
    device = scenes.device
    clip, ids = scenes.batch(count, *size, generator, anywhere=True)
    dropped = torch.rand(count, 1, generator=generator, device=device) < 0.1
    ids = torch.where(dropped, NULL, ids)
    noise = torch.randn(clip.shape, generator=generator, device=device)
    s = noise_levels(count, size, generator) if level is None else torch.full((count,), level, device=device)
    noisy = torch.lerp(clip, noise, s[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16):
        velocity = kind.velocity(model, noisy, s * 1000, ids)
    return F.mse_loss(velocity, noise - clip)


@torch.no_grad()
def validation_losses(
    kind: Kind, model: nn.Module, scenes: Scenes, size: Size, count: int, batches: int = 4
) -> dict[str, float]:
    """Mean loss over the same clips and noise at each noise level of VALIDATED_AT, and over the levels."""
    generator = torch.Generator(scenes.device)
    losses = {
        str(level): torch.stack(
            [
                flow_matching_loss(kind, model, scenes, size, count, generator.manual_seed(2**40 + i), level)
                for i in range(batches)
            ]
        ).mean()
        for level in VALIDATED_AT
    }
    losses["mean"] = torch.stack(list(losses.values())).mean()
    return {level: round(loss.item(), 5) for level, loss in losses.items()}


def attention_priority(device: torch.device, masked: bool) -> list[SDPBackend]:
    """SDPA backends, the one that trains fastest here first (cuDNN where it works, agrees and wins).

    A mask of padded text rules out flash attention, and cuDNN's would be as large as all scores.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if masked or device.type != "cuda":
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
        self.kind = KINDS[args.model]
        self.plan = TOY if args.toy else FULL
        self.device = torch.device(args.device)
        self.out = Path(args.out or f"outputs/tiny_{args.model}")
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.scenes = Scenes(self.device)
        self.generator = torch.Generator(self.device)
        self.model = self.kind.build(args.toy).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        self.state = State(batch=dict(self.plan.batch))
        self.resume()
        self.before = self.state.seconds
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph a size and class of block
            compile_blocks(self.model, fullgraph=True, dynamic=False)
        count = sum(p.numel() for p in self.model.parameters())
        print(
            f"{args.model}: {count / 1e6:.2f}M parameters on {self.device}, from step {self.state.step}",
            flush=True,
        )

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """The share of this training that is done."""
        return (self.state.seconds - self.state.fresh_seconds) / (60 * self.args.total_minutes)

    def resume(self) -> None:
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = State(**saved["state"])
        elif (self.out / "export" / "config.json").exists() and (self.out / "log.json").exists():
            weights = self.kind.load(self.out / "export").state_dict()
            self.model.load_state_dict(weights)
            self.ema.load_state_dict(weights)
            told, state = json.loads((self.out / "log.json").read_text()), self.state
            state.log = told["log"]
            state.step = state.fresh_step = told["step"]
            state.seconds = state.fresh_seconds = told["seconds"]

    def save(self) -> None:
        parts = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        state = {**parts, "optimizer": self.optimizer.state_dict(), "state": vars(self.state)}
        with written_whole(self.checkpoint) as path:
            torch.save(state, path)

    def step(self, size: Size, count: int) -> Tensor:
        """One step; its loss, still on the device: nothing here waits for the GPU."""
        state, parameters = self.state, list(self.model.parameters())
        rate = learning_rate(self.progress, state.step - state.fresh_step)
        self.generator.manual_seed(state.step)
        loss = flow_matching_loss(self.kind, self.model, self.scenes, size, count, self.generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - decay)
        return loss.detach()

    def train(self) -> None:
        """One leg: steps until `--minutes` are over or the whole training is."""
        args, state = self.args, self.state
        self.model.train()
        bar = tqdm(total=60 * args.minutes, unit="s", disable=not sys.stderr.isatty())
        losses: dict[Size, list[Tensor]] = {}
        saved = logged = self.started
        steps_left = args.max_steps or 10**9
        with sdpa_kernel(attention_priority(self.device, self.kind.masked), set_priority=True):
            while steps_left:
                elapsed = time.monotonic() - self.started
                state.seconds = self.before + elapsed
                if elapsed > 60 * args.minutes or self.progress >= 1:
                    break
                size = self.plan.size_at(self.progress, state.step)
                count = state.batch[size]
                try:
                    losses.setdefault(size, []).append(self.step(size, count))
                except torch.OutOfMemoryError:
                    if count == 1:
                        raise
                    state.batch[size] = count // 2
                    print(f"out of memory: batch {count // 2} for {size} from now on", flush=True)
                    self.optimizer.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    continue
                state.step += 1
                steps_left -= 1
                bar.update(round(elapsed) - bar.n)
                if state.step % args.log_every == 0:
                    means = {
                        "x".join(map(str, size)): torch.stack(x).mean().item() for size, x in losses.items()
                    }
                    if not all(map(math.isfinite, means.values())):
                        raise RuntimeError(f"step {state.step}: the loss is not finite, {means}")
                    now = time.monotonic()
                    entry = {"step": state.step, "progress": round(self.progress, 4)}
                    entry["steps_per_second"] = round(sum(map(len, losses.values())) / (now - logged), 2)
                    entry["loss"] = {size: round(loss, 5) for size, loss in means.items()}
                    state.log.append(entry)
                    bar.write(json.dumps(entry))
                    losses.clear()
                    logged = now
                    if now - saved > 60:
                        self.save()
                        saved = now
        bar.close()
        self.save()

    def finish(self) -> None:
        """Writes the averaged weights in bf16, the log with validation losses, and sample sheets."""
        del self.model
        export = self.out / "export"
        copy.deepcopy(self.ema).to(torch.bfloat16).save_pretrained(export, max_shard_size=SHARD_BYTES)
        told = {"step": self.state.step, "seconds": self.state.seconds, "log": self.state.log}
        self.write_log(told)
        final = self.kind.load(export, self.device, torch.bfloat16)
        told["validation"] = {}
        for size in self.plan.sample_sizes:
            count = max(1, self.plan.batch[size] // 2)
            losses = validation_losses(self.kind, final, self.scenes, size, count)
            told["validation"]["x".join(map(str, size))] = losses
        print(f"validation {json.dumps(told['validation'])}", flush=True)
        self.write_log(told)
        for size in self.plan.sample_sizes:
            self.write_samples(final, size)

    def write_log(self, told: dict[str, object]) -> None:
        with written_whole(self.out / "log.json") as path:
            path.write_text(json.dumps(told, indent=1))

    def write_samples(self, model: nn.Module, size: Size, count: int = 6, columns: int = 8) -> None:
        """A sheet of sampled clips: one row a clip, frames side by side, its caption above."""
        import numpy as np
        from PIL import Image, ImageDraw

        generator = torch.Generator(self.device).manual_seed(7)
        ids = self.scenes.batch(count, *size, generator)[1]
        noise = torch.randn(count, 3, *size, generator=generator, device=self.device)
        clips = sample(model, noise, ids, steps=self.plan.sample_steps, velocity=self.kind.velocity)
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
    parser = argparse.ArgumentParser(description="Train a tiny model in resumable legs.")
    parser.add_argument("--model", choices=KINDS, default="wan")
    parser.add_argument("--minutes", type=float, default=8, help="length of this leg, compiling included")
    parser.add_argument(
        "--total-minutes", type=float, default=16, help="length of the whole training, all legs"
    )
    parser.add_argument("--out", help="default: outputs/tiny_<model>")
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
