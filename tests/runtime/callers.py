"""Modules that call a stand-in for a compiled graph, as diffusers' models call their compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svg_ear_compile.kernels import context
from svg_ear_compile.passes.site import GraphInputs
from svg_ear_compile.precedence import resolve
from svg_ear_compile.reporting import GraphRecord, SiteRecord
from svg_ear_compile.runtime.key_padding import MaskSource
from svg_ear_compile.runtime.wrapper import RuntimePlan, SparseCallable

VIDEO, ROTARY, MASK = range(3)
SPARSE = {"dense_steps": 0, "strict": True, "density": 0.25}
STEERED = {**SPARSE, "density": None, "target_error": 0.1, "measure_every": 1}
AS_IT_IS = MaskSource((MASK,), "shown", sized=False)


def site() -> SiteRecord:
    """The site 0, at the place "attn1" of its module."""
    return SiteRecord(
        "attn1", "Attention", "self", 1, 2, 4, 16, 16, 16, 16, "float32", "none", 0, True, "REWRITTEN", "", "", 0,
        None, "unknown",
    )  # fmt: skip


class Graph:
    """Records the context of each call, and reads the mask if the context does not know it."""

    def __init__(self) -> None:
        self.contexts: list[context.RunContext] = []
        self.mask_reads = 0
        self.fail = False
        self.leave: dict[int, tuple[Tensor, Tensor]] = {}
        self.error = 0.0
        """What every call measures, whatever its density."""
        self.look: Callable[[context.RunContext], Any] = lambda call: None

    def __call__(self, *args: Any) -> Tensor:
        call = context.current()
        self.contexts.append(call)
        self.look(call)
        decision, results, memo = call.decisions.sites[0], call.results, call.memo
        if 0 not in memo.seen_keys:
            self.mask_reads += 1
            memo.seen_keys[0] = int(args[MASK].sum())
        if self.fail and not decision.dense:
            results.dense[0] = "failed: ValueError"
        memo.carried.update(self.leave)
        if (request := decision.measure) is not None:
            tried = len(request.densities) * len(request.orders or ("its own",)) * (1 + request.first_order)
            errors = torch.full((tried + (not decision.dense),), self.error)
            results.measured[0] = torch.stack([errors**2, torch.ones_like(errors)], 1)[..., None, None]
        return args[VIDEO]

    def decided(self, name: str) -> list[Any]:
        """A field of what was decided for the site in each call."""
        return [getattr(call.decisions.sites[0], name) for call in self.contexts]


class Grids:
    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, tables: Sequence[Tensor], tokens: int) -> tuple[int, int, int]:
        self.reads += 1
        return 2, tokens // 4, 2


def callable_of(
    options: dict[str, Any], mask: MaskSource = AS_IT_IS, number: int = 0
) -> tuple[SparseCallable, Graph, Grids]:
    """The callable of a graph with one site; its arguments are [video, rotary, mask]."""
    graph, grids = Graph(), Grids()
    plan = RuntimePlan((0,), GraphInputs(rotary=(ROTARY,)), VIDEO, {0: 0}, {0: mask}, True, grids)
    resolved = resolve({**SPARSE, **options}, {})
    record = GraphRecord(number, resolved, [site()])
    return SparseCallable(graph, plan, resolved.settings, record), graph, grids


class Block(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
        return self.run(x, rotary, mask)


class Model(nn.Module):
    """Blocks compiled one by one share a graph."""

    def __init__(self, *runs: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(run) for run in runs)

    def forward(self, hidden_states: Tensor, timestep: Any, mask: Tensor | None = None) -> Tensor:
        tokens = hidden_states.shape[1]
        rotary = torch.arange(tokens * 4.0).reshape(tokens, 4)
        mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if mask is None else mask
        for block in self.blocks:
            hidden_states = block(hidden_states, rotary, mask)
        return hidden_states


class Scheduler:
    def __init__(self, steps: int) -> None:
        self.timesteps = torch.linspace(1000, 100, steps)


class Pipeline:
    """Loops as diffusers' do; `each(i)` runs after each step. guided: calls a step."""

    def __init__(self, model: nn.Module, second: nn.Module | None = None) -> None:
        self.model, self.second = model, second
        self.scheduler = Scheduler(1)
        self.interrupt = False

    def __call__(
        self, steps: int, guided: int = 2, tokens: int = 16, each: Callable[[int], Any] = lambda i: None
    ) -> None:
        self.scheduler = Scheduler(steps)
        timesteps = self.scheduler.timesteps
        self.interrupt = False
        x = torch.zeros(1, tokens, 8)
        for i, t in enumerate(timesteps):
            if self.interrupt:
                continue
            model = self.second if self.second is not None and t < 500 else self.model
            model(x, timestep=t.expand(1))
            if guided > 1:
                model(x, timestep=t.expand(1))
            each(i)
