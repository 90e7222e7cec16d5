"""How long does a call take on the GPU, and which part of it takes how long?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from svg_ear_compile.kernels.blocks import cluster

# The names of kernels that belong to a stage; all others are its "rest": routing, lists, offsets, copies.
STAGES = {"permute ms": ("gather_kernel",), "probe ms": ("probe_kernel",), "attend ms": ("attention",)}

# The same of a whole model, the first that fits: Inductor's own kernels are called triton_.
GROUPS = {
    "permutation": ("gather_kernel",), "probe": ("probe_kernel",),
    "routing": ("shift_kernel", "search_kernel", "lists_kernel"),
    "first-order terms": ("covariance", "weights_kernel"),
    "splits": ("directions_kernel", "partition_kernel", "project_kernel"),
    "measuring errors": ("rows_kernel",),
    "dense attention": ("fmha", "flash", "sdpa", "cudnn"), "sparse attention": ("attention_kernel",),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"), "Inductor's kernels": ("triton_",),
}  # fmt: skip


def milliseconds(call: Callable[[int], Any], repeats: int, warmup: int = 1, in_a_row: int = 1) -> float:
    """Median of CUDA-event times; call gets the number of the run.

    in_a_row: so many calls follow each other without waiting, as in a model; the time is of one of them.
    """
    times = []
    for i in range(warmup + repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for k in range(in_a_row):
            call(i * in_a_row + k)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / in_a_row)
    return sorted(times[warmup:])[repeats // 2]


def kernels_of(call: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What the call returns, and the profiler's events of its kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return result, events


def groups(events: Iterable[Any]) -> list[dict[str, Any]]:
    """GPU time by group of kernels, the longest first. example: of the longest kernel of a group."""
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        named = (group for group, names in GROUPS.items() if any(name in event.name for name in names))
        group, ms = next(named, "rest"), event.device_time / 1000
        row = rows.setdefault(group, {"group": group, "ms": 0.0, "kernels": 0, "longest": 0.0, "example": ""})
        row["ms"] += ms
        row["kernels"] += 1
        if ms > row["longest"]:
            row |= {"longest": ms, "example": event.name[:40]}
    return sorted(rows.values(), key=lambda row: -row["ms"])


def stage_times(call: Callable[[int], Any]) -> dict[str, float]:
    """Milliseconds of GPU time by stage, and the number of kernels, of one call."""
    _, events = kernels_of(lambda: call(0))
    stages = dict.fromkeys(["clustering ms", *STAGES, "rest ms"], 0.0)
    for event in events:
        named = (stage for stage, names in STAGES.items() if any(name in event.name for name in names))
        stages[next(named, "rest ms")] += event.device_time / 1000

    def profiled(make_blocks: Callable[[], Any]) -> Any:
        blocks, own = kernels_of(make_blocks)
        stages["clustering ms"] += sum(event.device_time for event in own) / 1000
        return blocks

    with around_clustering(profiled):
        call(0)
    stages["rest ms"] -= stages["clustering ms"]
    return {**stages, "kernels": len(events)}


@contextmanager
def around_clustering(watch: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, each call that puts tokens into blocks is handed to `watch`, which makes it."""
    real = cluster.make_blocks
    with mock.patch.object(cluster, "make_blocks", lambda *a, **k: watch(lambda: real(*a, **k))):
        yield


def clustering_time(call: Callable[[int], Any], repeats: int) -> float:
    """Median milliseconds that a call spends on putting queries and keys into blocks, between events."""
    marks: list[torch.cuda.Event] = []

    def marked(make_blocks: Callable[[], Any]) -> Any:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        blocks = make_blocks()
        stop.record()
        marks.extend((start, stop))
        return blocks

    times = []
    with around_clustering(marked):
        for i in range(repeats):
            marks.clear()
            call(i)
            torch.cuda.synchronize()
            times.append(sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True)))
    return sorted(times)[repeats // 2]
