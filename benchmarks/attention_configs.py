"""Which configuration of the attention kernel is fastest on this GPU? The table behind triton_configs.py.

    python benchmarks/attention_configs.py [--length 75600 --heads 40 --head-dim 128 --density .15]

Plans are made up: 128 x 64 tiles in token order, rows' budgets lognormal(0.7), kept blocks at random, more of
them near the diagonal; --clusters adds ragged blocks of the paper's counts. Every configuration is compared
with the first one's output. The last line of the equal tiles is what `attend` chooses by itself: on Hopper
the kernel in triton_hopper.py, which has no configurations and no exact part alone.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_ear_compile.kernels.attention import triton as triton_attention
from svg_ear_compile.kernels.attention.schedule_triton import schedule
from svg_ear_compile.kernels.blocks import permute_triton as triton_permute
from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan
from svg_ear_compile.kernels.probe import torch as probe
from svg_ear_compile.kernels.probe import triton as triton_probe
from svg_ear_compile.kernels.routing import triton as triton_route
from svg_ear_compile.kernels.triton_configs import Config

EQUAL = [
    Config(128, 64, 128, 8, 3, 2, pair=True, tma=True),
    Config(128, 64, 64, 8, 3, 3, pair=True, tma=True),
    Config(128, 64, 128, 8, 2, 2, pair=True, tma=True),
    Config(128, 64, 64, 8, 2, 2, pair=True, tma=True),
    Config(128, 64, 64, 8, 3, 3, tma=True),
    Config(128, 64, 64, 8, 4, 4, tma=True),
    Config(128, 64, 64, 8, 2, 2, tma=True),
    Config(128, 64, 64, 4, 3, 3, tma=True),
    Config(128, 64, 64, 4, 2, 2, tma=True),
    Config(64, 64, 64, 4, 2, 2, pair=True, tma=True),
    Config(64, 64, 64, 4, 3, 3, tma=True),
    Config(128, 64, 128, 8, 2, 2, pair=True),
    Config(128, 64, 64, 8, 3, 3),
]
CLUSTERS = [
    Config(128, 64, 128, 8, 3, 2, tma=True),
    Config(128, 64, 64, 8, 3, 3, tma=True),
    Config(128, 32, 64, 8, 3, 3, tma=True),
    Config(128, 128, 128, 8, 3, 2, tma=True),
    Config(64, 64, 64, 4, 3, 3, tma=True),
    Config(64, 32, 64, 4, 3, 3, tma=True),
]


PROBE = [
    Config(64, 64, 64, 4, 3, 1, tma=True),
    Config(64, 64, 64, 4, 2, 1, tma=True),
    Config(128, 64, 64, 8, 3, 1, tma=True),
    Config(128, 64, 64, 8, 2, 1, tma=True),
    Config(128, 64, 64, 4, 3, 1, tma=True),
    Config(64, 64, 64, 4, 2, 1),
]


def made_up_plan(key: Tensor, value: Tensor, density: float, clusters: bool) -> SparsePlan:
    """A plan over key, value [1,H,L,D] contiguous, with the tokens in their own order."""
    B, H, L, D = key.shape
    device = key.device
    random = torch.Generator(device).manual_seed(1)
    if clusters:
        counts = (L * 300 // 75_600 + 1, L * 1000 // 75_600 + 1)
        inner = [
            torch.randint(0, L, (B, H, n - 1), device=device, generator=random).sort(-1).values
            for n in counts
        ]
        ends = [torch.full((B, H, 1), n, device=device) for n in (0, L)]
        query_offsets, key_offsets = (torch.cat([ends[0], x, ends[1]], -1).int() for x in inner)
    else:
        counts = (-(-L // QUERY_BLOCK), -(-L // KEY_BLOCK))
        query_offsets, key_offsets = (
            (torch.arange(n + 1, device=device) * size).clamp(max=L).int().expand(B, H, -1).contiguous()
            for n, size in zip(counts, (QUERY_BLOCK, KEY_BLOCK), strict=True)
        )
    Cq, Ck = counts
    share = (0.7 * torch.randn(B, H, Cq, device=device, generator=random)).exp()
    share = (share * (density / share.mean())).clamp(max=1)
    place = torch.rand(B, H, Cq, Ck, device=device, generator=random)
    near = (torch.arange(Cq, device=device)[:, None] / Cq - torch.arange(Ck, device=device) / Ck).abs()
    place -= (near < density / 4).float()
    sizes = key_offsets.diff(dim=-1)
    wanted = (share * Ck).round().clamp(min=1).long()
    threshold = place.sort(-1).values.gather(-1, (wanted - 1)[..., None])
    kept = (place <= threshold) & (sizes > 0)[:, :, None]
    blocks = (~kept).to(torch.uint8).argsort(dim=-1, stable=True).int()
    means = []
    for x in (key, value):
        sums = torch.cat([x.new_zeros(B, H, 1, D, dtype=torch.float32), x.float().cumsum(2)], 2)
        at = key_offsets.long()[..., None].expand(-1, -1, -1, D)
        means.append((sums.gather(2, at).diff(dim=2) / sizes.clamp(min=1)[..., None]).to(x.dtype))
    bias = sizes.float().log()[:, :, None].expand(B, H, Cq, Ck).masked_fill(kept, -math.inf)
    order = torch.arange(L, device=device, dtype=torch.int32).expand(B, H, L).contiguous()
    return SparsePlan(
        key, value, order, query_offsets, order, key_offsets, means[0], means[1], bias.contiguous(),
        kept.sum(-1, dtype=torch.int32), blocks.contiguous(), key.new_zeros(B, H, Cq, D),
    )  # fmt: skip


def milliseconds(call, repeats: int) -> float:
    """Median of CUDA-event times."""
    times = []
    for _ in range(repeats + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=75_600)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clusters", action="store_true", help="the paper's ragged clusters too")
    arguments = parser.parse_args()
    L, H, D = arguments.length, arguments.heads, arguments.head_dim
    random = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, L, H, D, device="cuda", dtype=torch.bfloat16, generator=random).transpose(1, 2)
        for _ in range(3)
    )
    dense = math.inf
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                dense = min(
                    dense, milliseconds(partial(F.scaled_dot_product_attention, query, key, value), 3)
                )
            except RuntimeError as error:
                print(backend, error)
    rows = []
    for clusters in (False, True) if arguments.clusters else (False,):
        plan = made_up_plan(key.contiguous(), value.contiguous(), arguments.density, clusters)
        pairs = plan.query_offsets.diff(dim=-1)[..., None].double() * _kept_keys(plan)[..., None].double()
        exact = pairs.sum().item() / (H * L * L)
        first = None
        for c in CLUSTERS if clusters else [*EQUAL, None]:
            out = torch.empty(1, L, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            options = {"variable": clusters, "config": c}
            row = ["clusters" if clusters else "equal", *(c or ["chosen", *" " * (len(Config._fields) - 1)])]
            try:
                attend = partial(triton_attention.attend, query, plan, D**-0.5, out, **options)
                only = partial(triton_attention.sparse_exact, query, plan, D**-0.5, out, **options)
                times = [c and milliseconds(only, arguments.repeats), milliseconds(attend, arguments.repeats)]
                first = out if first is None else first
                error = ((out.float() - first.float()).norm() / first.float().norm()).item()
                rate = c and 4 * H * L * L * D * exact / times[0] / 1e9
                rows.append([*row, *times, rate, dense / times[1], error])
            except Exception as error:  # noqa: BLE001 - one configuration may not fit this GPU
                rows.append([*row, f"{type(error).__name__}: {str(error)[:60]}"])
        print(f"{rows[-1][0]}: exact density {exact:.4f}", flush=True)
    tiles = milliseconds(lambda: schedule(plan, QUERY_BLOCK, clusters), 3)
    headers = ["blocks", *Config._fields, "exact only ms", "fused ms", "exact TFLOP/s", "x dense", "vs first"]
    print(f"{torch.cuda.get_device_name()}, L={L} H={H} D={D}, dense {dense:.1f} ms, schedule {tiles:.3f} ms")
    print(tabulate(rows, headers=headers, floatfmt=".4g"))
    print(tabulate(other_stages(query, key, value, arguments), headers="keys", floatfmt=".4g"))


def other_stages(query: Tensor, key: Tensor, value: Tensor, arguments: argparse.Namespace) -> list[dict]:
    """Times of the gather and of the probe's configurations, with the tokens in a random order."""
    repeats, records = arguments.repeats, []
    for clusters in (False, True) if arguments.clusters else (False,):
        plan = made_up_plan(key.contiguous(), value.contiguous(), arguments.density, clusters)
        name = "clusters" if clusters else "equal"
        shuffled = torch.rand(plan.query_order.shape, device=key.device).argsort(-1).int()
        both = partial(triton_permute.gather_with_means, key, value, shuffled, plan.key_offsets)
        records.append({"blocks": name, "stage": "gather and means", "ms": milliseconds(both, repeats)})
        means = partial(triton_permute.gathered_means, query, shuffled, plan.query_offsets)
        records.append({"blocks": name, "stage": "means alone", "ms": milliseconds(means, repeats)})
        centroids = triton_permute.gathered_means(query, plan.query_order, plan.query_offsets)
        inputs = (centroids, plan.key, plan.value, plan.key_offsets)
        inputs = (*inputs, plan.key_centroids.float(), plan.value_centroids.float(), query.shape[-1] ** -0.5)
        for routing in ("output_error", "svg_ear"):
            for c in PROBE:
                call = partial(triton_probe.probe, *inputs, routing, clusters, c)
                record = {"blocks": name, "stage": f"probe {routing}", "ms": None, **c._asdict()}
                try:
                    record["ms"] = milliseconds(call, repeats)
                except Exception as error:  # noqa: BLE001 - one configuration may not fit this GPU
                    record["ms"] = f"{type(error).__name__}: {str(error)[:60]}"
                records.append(record)
        if not clusters:
            plain = partial(probe.probe, *inputs, "output_error", False)
            records.append({"blocks": name, "stage": "probe in PyTorch", "ms": milliseconds(plain, 1)})
            scores = triton_probe.probe(*inputs, "output_error", False)
            of_blocks = (plan.query_offsets, plan.key_offsets, tuple(plan.bias.shape[-2:]))
            routing_alone = partial(
                triton_route.select, scores, *of_blocks, "output_error", arguments.density, True
            )
            records.append(
                {"blocks": name, "stage": "routing alone", "ms": milliseconds(routing_alone, repeats)}
            )
    return records


def _kept_keys(plan: SparsePlan) -> Tensor:
    """[B,H,Cq]: keys in each row's kept blocks."""
    sizes = plan.key_offsets.diff(dim=-1)[:, :, None].expand_as(plan.kept_blocks)
    listed = torch.arange(plan.bias.shape[-1], device=sizes.device) < plan.kept_count[..., None]
    return (sizes.gather(-1, plan.kept_blocks.long().clamp(min=0)) * listed).sum(-1)


if __name__ == "__main__":
    main()
