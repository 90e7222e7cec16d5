"""Trains one of the tiny models (`kinds.py`) by flow matching (`losses.py`) on procedural scenes, in resumable legs.

    python examples/tiny_wan/train.py --model wan --minutes 8 --total-minutes 16

A leg stops by itself after `--minutes` and writes `checkpoint.pt`; the same command then goes on where it
stopped. Learning rate and clip sizes (`plans.py`) follow the share of `--total-minutes` spent so far, so legs of
any length compose. Every leg ends with `samples_*.png`, `log.json` and `export/` (the averaged weights in bf16).
Without a checkpoint but with `export/` and `log.json`, a new training of `--total-minutes` starts from those
weights.

    python examples/tiny_wan/train.py --plan calm --start svg_ear_compile/tiny_wan --drop-block 6 --minutes 8.5

trains the packaged weights on, without one of their blocks. Without `--total-minutes` this leg is the whole
training, and its schedule begins when everything is compiled.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from attention_trial import attention_priority
from kinds import KINDS, compile_blocks
from losses import Size, flow_matching_loss, validation_losses
from plans import PLANS, learning_rate
from scenes import Scenes
from sheets import write_samples
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

EMA_DECAY = 0.998
SHARD_BYTES = 15_600_000  # no file of 16 MB or more, however the last tensor falls
SAVED_EVERY = 120  # seconds


@dataclass
class State:
    """What a later leg needs besides weights and optimizer. Seeds derive from `step`, so no RNG state."""

    step: int = 0
    seconds: float = 0.0  # trained so far, all legs
    fresh_step: int = 0  # step and seconds at which this training began: with a fresh optimizer
    fresh_seconds: float = 0.0
    batch: dict[Size, int] = field(default_factory=dict)
    log: list[dict[str, object]] = field(default_factory=list)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` only once the block has ended well."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def optimizers(model: nn.Module, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon` the matrices of the blocks get Muon, at the same size of a step (arXiv 2502.16982)."""
    matrices = [p for name, p in model.named_parameters() if muon and p.ndim == 2 and "blocks." in name]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    fused = others[0].is_cuda
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    ]
    if matrices:
        chosen.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return chosen


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.args = args
        self.kind = KINDS[args.model]
        self.plan = PLANS[args.plan]
        self.toy = args.plan == "toy"
        self.device = torch.device(args.device)
        self.out = Path(args.out or f"outputs/tiny_{args.model}")
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.scenes = Scenes(self.device)
        self.generator = torch.Generator(self.device)
        self.model = self.build().to(self.device).requires_grad_()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = optimizers(self.model, self.plan.muon)
        self.state = State(batch=dict(self.plan.batch))
        self.validation: dict[str, dict[str, dict[str, float]]] = {}
        self.resume()
        self.before, self.compiled = self.state.seconds, self.started
        if args.start:
            self.validate("before", self.kind.load(args.start, self.device, torch.bfloat16))
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph a size and class of block
            compile_blocks(self.model, fullgraph=True, dynamic=False)
        count = sum(p.numel() for p in self.model.parameters())
        print(
            f"{args.model}: {count / 1e6:.2f}M parameters on {self.device}, from step {self.state.step}",
            flush=True,
        )

    def build(self) -> nn.Module:
        if self.args.start is None:
            return self.kind.build(self.toy)
        model = self.kind.load(self.args.start)
        if self.args.drop_block is not None:
            del model.blocks[self.args.drop_block]
            model.register_to_config(num_layers=len(model.blocks))
        return model

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """The share of this training that is done."""
        if self.args.total_minutes is None:  # this leg alone, once it is compiled
            compiled = self.compiled - self.started
            return (self.state.seconds - self.before - compiled) / (60 * self.args.minutes - compiled)
        return (self.state.seconds - self.state.fresh_seconds) / (60 * self.args.total_minutes)

    def resume(self) -> None:
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
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
        """The checkpoint, or without one what a new training can start from."""
        if not self.args.checkpoint:
            self.export()
            return
        parts = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        with written_whole(self.checkpoint) as path:
            torch.save({**parts, "optimizers": states, "state": vars(self.state)}, path)

    def export(self) -> Path:
        """The averaged weights in bf16, and the log."""
        folder = self.out / "export"
        copy.deepcopy(self.ema).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_BYTES)
        self.write_log()
        return folder

    def loss(self, size: Size, count: int) -> Tensor:
        calm = self.plan.calm
        return flow_matching_loss(self.kind, self.model, self.scenes, size, count, self.generator, calm=calm)

    def compile(self) -> None:
        """Runs the model once at every size, so that compiling takes nothing of the schedule."""
        for size in {size for _, sizes in self.plan.phases for size in sizes}:
            self.loss(size, self.state.batch[size]).backward()
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, size: Size, count: int) -> Tensor:
        """One step; its loss, still on the device: nothing here waits for the GPU."""
        state, parameters = self.state, list(self.model.parameters())
        rate = learning_rate(self.progress, state.step - state.fresh_step)
        self.generator.manual_seed(state.step)
        loss = self.loss(size, count)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - decay)
        return loss.detach()

    def train(self) -> None:
        """One leg: steps until `--minutes` are over or the whole training is."""
        args, state = self.args, self.state
        self.model.train()
        bar = tqdm(total=60 * args.minutes, unit="s", disable=not sys.stderr.isatty())
        losses: dict[Size, list[Tensor]] = {}
        steps_left = args.max_steps or 10**9
        with sdpa_kernel(attention_priority(self.device, self.kind.masked), set_priority=True):
            if args.total_minutes is None:
                self.compile()
            saved = logged = self.compiled = time.monotonic()
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
                    self.model.zero_grad(set_to_none=True)
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
                    if now - saved > SAVED_EVERY:
                        self.save()
                        saved = now
        bar.close()
        self.save()

    def finish(self) -> None:
        """Exports, and writes the log with validation losses (of calm clips, too) and a sheet of samples a size."""
        del self.model
        final = self.kind.load(self.export(), self.device, torch.bfloat16)
        self.validate("after", final)
        self.write_log()
        for size in self.plan.sample_sizes:
            path = self.out / f"samples_{'x'.join(map(str, size))}.png"
            write_samples(path, self.kind, final, size, self.plan.samplers)

    def validate(self, when: str, model: nn.Module) -> None:
        for size in self.plan.sample_sizes:
            count = max(1, self.plan.batch[size] // 2)
            for calm in sorted({0.0, float(self.plan.calm > 0)}):
                losses = validation_losses(self.kind, model, self.scenes, size, count, calm=calm)
                name = "x".join(map(str, size)) + (", calm" if calm else "")
                self.validation.setdefault(when, {})[name] = losses
        print(f"validation {when} {json.dumps(self.validation[when])}", flush=True)

    def write_log(self) -> None:
        told = {"step": self.state.step, "seconds": self.state.seconds, "log": self.state.log}
        with written_whole(self.out / "log.json") as path:
            path.write_text(json.dumps({**told, "validation": self.validation}, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model in resumable legs.")
    parser.add_argument("--model", choices=KINDS, default="wan")
    parser.add_argument("--minutes", type=float, default=8, help="length of this leg, compiling included")
    parser.add_argument(
        "--total-minutes", type=float, help="length of the whole training (default: this leg)"
    )
    parser.add_argument("--plan", choices=PLANS, default="full", help="toy: tiny clips, to test the script")
    parser.add_argument("--start", type=Path, help="a folder of trained weights to start from")
    parser.add_argument("--drop-block", type=int, help="leave this block of --start out (Wan)")
    parser.add_argument("--no-checkpoint", dest="checkpoint", action="store_false", help="export instead")
    parser.add_argument("--out", help="default: outputs/tiny_<model>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--max-steps", type=int, help="end the leg after so many steps")
    trainer = Trainer(parser.parse_args(argv))
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    main()
