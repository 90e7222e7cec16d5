"""Every shipped configuration compiles for every GPU, fits into its shared memory and does not spill.

Needs no GPU: Triton's own compiler and the ptxas and cuobjdump in its wheel. `make test` compiles one kernel,
a plain run the configurations that video models use: attention for all GPUs and the other kernels for two of
them. SVG_EAR_TEST_ALL_CONFIGS=1 compiles all (about half an hour).
"""

# ruff: noqa: E402

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from compiling import KILOBYTES, NAMES, STREAMS, TOOLS, compiled, compiled_attention, resources

from svg_ear_compile.kernels.attention import covariance_triton as triton_covariance
from svg_ear_compile.kernels.attention import schedule_triton as triton_schedule
from svg_ear_compile.kernels.attention.choice import why_not_hopper
from svg_ear_compile.kernels.blocks import permute_triton as triton_permute
from svg_ear_compile.kernels.blocks import splits_triton as triton_splits
from svg_ear_compile.kernels.measuring import rows_triton as triton_rows
from svg_ear_compile.kernels.papers import kmeans_triton as triton_kmeans
from svg_ear_compile.kernels.probe import triton as triton_probe
from svg_ear_compile.kernels.routing import triton as triton_route
from svg_ear_compile.kernels.triton_configs import (
    assign_config_for,
    probe_config_for,
)

pytestmark = [
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this Triton has no cuobjdump"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

EVERYTHING = os.environ.get("SVG_EAR_TEST_ALL_CONFIGS") == "1"
HALVES = (torch.bfloat16, torch.float16)
SMALL_KERNELS_ON = list(KILOBYTES) if EVERYTHING else [(8, 9), (9, 0)]


def named(value) -> str:
    """What pytest -k knows a parameter by: (12, 0) is sm_120."""
    return "sm_{}{}".format(*value) if isinstance(value, tuple) else str(value)


def cases():
    for capability in KILOBYTES:
        for head_dim in (16, 32, 64, 96, 128, 192, 256) if EVERYTHING else (64, 128):
            for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
                for variable in (False, True):
                    for streams in STREAMS if EVERYTHING else ("attend", "attend, first order"):
                        short = capability in ((8, 6), (8, 9)) or (variable and capability != (9, 0))
                        short = short or streams == "attend, first order"
                        if EVERYTHING or not short or (head_dim == 128 and not variable):
                            yield capability, head_dim, dtype, variable, streams


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "head_dim", "dtype", "variable", "streams"), list(cases()), ids=named)
def test_configuration(tmp_path, capability, head_dim, dtype, variable, streams):
    kernel = compiled_attention(capability, head_dim, dtype, variable, streams)
    # Behind the loops the matrix comes on top of a full house of registers: a few of them wait in memory.
    check(kernel, tmp_path, capability, dtype, stack=96 if "first order" in streams else 0)


@pytest.mark.slow
def test_rows_that_tma_cannot_take(tmp_path):
    kernel = compiled_attention((9, 0), 100, torch.bfloat16, False, "attend")
    check(kernel, tmp_path, (9, 0), torch.bfloat16)
    assert "cp.async.bulk.tensor" not in kernel.asm["ptx"]


def check(kernel, tmp_path, capability, dtype, stack=0):
    assert kernel.metadata.shared <= KILOBYTES[capability] * 1024
    used = resources(kernel, tmp_path)
    print(used, kernel.metadata.shared)
    if dtype != torch.float32:  # three TF32 products spill; float32 is supported, not fast
        assert used["STACK"] <= stack
        assert used["LOCAL"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variable", [False, True], ids=["tiles", "clusters"])
@pytest.mark.parametrize("routing", ["output_error", "svg_ear"])
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_probe(tmp_path, capability, routing, variable):
    for head_dim in (16, 64, 96, 128, 192, 256) if EVERYTHING else (128,):
        for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
            c = probe_config_for(capability, head_dim, dtype)
            by_token = routing == "svg_ear"
            options = triton_probe.meta(c, head_dim, dtype, variable, not by_token)
            types, absent = ({"value": "*fp32"}, ()) if by_token else (None, ("mass",))
            kernel = compiled(triton_probe.probe_kernel, capability, dtype, options, types, absent)
            check(kernel, tmp_path, capability, dtype)
            if by_token:
                options = triton_probe.spread_meta(head_dim)
                kernel = compiled(triton_probe.spread_kernel, capability, dtype, options)
                check(kernel, tmp_path, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_gather(tmp_path, capability):
    for pair, (head_dim, dtype) in itertools.product(
        (True, False),
        ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)),
    ):
        options = triton_permute.meta(head_dim, pair, dtype.itemsize)
        absent = () if pair else ("y", "x_out", "y_out", "y_means")
        kernel = compiled(triton_permute.gather_kernel, capability, dtype, options, None, absent)
        check(kernel, tmp_path, capability, torch.bfloat16)  # float32 must not spill either


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_covariance(tmp_path, capability):
    for head_dim in (16, 64, 96, 128, 192, 256) if EVERYTHING else (128,):
        for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
            options, types = (
                triton_covariance.meta(head_dim, dtype),
                {"heads": "*i64", "key": f"*{NAMES[dtype]}"},
            )
            kernel = compiled(triton_covariance.covariance_kernel, capability, dtype, options, types)
            check(kernel, tmp_path, capability, dtype, stack=8)  # two registers, outside of the loop
            types |= {"bias": "*fp32"}
            for group in (1, 4, 64):
                options = triton_covariance.weights_meta(head_dim, dtype, group)
                kernel = compiled(triton_covariance.weights_kernel, capability, dtype, options, types)
                check(kernel, tmp_path, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_rows(tmp_path, capability):
    for head_dim in (16, 64, 96, 128, 192, 256) if EVERYTHING else (128,):
        for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
            options = triton_rows.meta(capability, head_dim, dtype)
            types = {"key": f"*{NAMES[dtype]}", "blocks": "*i64", "out": "*fp32", "share": "*fp32"}
            kernel = compiled(triton_rows.rows_kernel, capability, dtype, options, types)
            check(kernel, tmp_path, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_splits(tmp_path, capability):
    for head_dim in (64, 96, 128) if EVERYTHING else (128,):  # directions of larger ones spill: not fast
        for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
            kernels = [
                (triton_splits.directions_kernel, triton_splits.directions_meta(head_dim, width))
                for width in (64, 128, 256)
            ]
            kernels += [
                (triton_splits.project_kernel, triton_splits.project_meta(head_dim, block))
                for block in (64, 128)
            ]
            for kernel, options in kernels:
                check(compiled(kernel, capability, dtype, options), tmp_path, capability, dtype)
    for width in (128, 4000, 10**5):
        options, types = triton_splits.partition_meta(width), {"out": "*i32"}
        kernel = compiled(triton_splits.partition_kernel, capability, torch.bfloat16, options, types)
        check(kernel, tmp_path, capability, None)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_kmeans(tmp_path, capability):
    for head_dim in (64, 96, 128, 256) if EVERYTHING else (128,):
        for dtype in NAMES if EVERYTHING else (torch.bfloat16,):
            options = triton_kmeans.meta(assign_config_for(capability, head_dim, dtype), head_dim)
            absent = ("low",) if dtype == torch.float32 else ()
            for absent_too in ((*absent, "valid"), absent):
                kernel = compiled(triton_kmeans.assign_kernel, capability, dtype, options, None, absent_too)
                check(kernel, tmp_path, capability, dtype)
    options, absent = triton_permute.meta(128, False), ("y", "x_out", "y_out", "y_means")
    types = {"order": "*i64", "offsets": "*i64", "x_means": "*fp32"}
    kernel = compiled(triton_permute.gather_kernel, capability, torch.bfloat16, options, types, absent)
    check(kernel, tmp_path, capability, torch.bfloat16)


HOPPER = [(head_dim, dtype, terms) for head_dim in (64, 128) for dtype in HALVES for terms in (False, True)]


def check_hopper(tmp_path, kernel, dtype, options, stack):
    if why_not := why_not_hopper((9, 0), dtype, options["HEAD_DIM"], False, triton.__version__):
        pytest.skip(why_not)
    from triton.experimental.gluon._runtime import GluonASTSource

    from svg_ear_compile.kernels.hopper_tiles import BOX

    kernel = compiled(kernel, (9, 0), dtype, options, source=GluonASTSource, box=BOX)
    check(kernel, tmp_path, (9, 0), dtype, stack=stack)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    registers = [int(n) for n in re.findall(r"setmaxnreg.inc.sync.aligned.u32\s+(\d+)", kernel.asm["ptx"])]
    assert max(registers) >= 240


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype", "terms"), HOPPER if EVERYTHING else [HOPPER[i] for i in (1, 2, 4, 5)], ids=named
)
def test_hopper(tmp_path, head_dim, dtype, terms):
    hopper = pytest.importorskip("svg_ear_compile.kernels.attention.hopper")
    # A few registers wait in memory, outside of the loops.
    check_hopper(tmp_path, hopper.attention_kernel, dtype, hopper.meta(head_dim, terms), stack=48)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)], ids=named)
def test_probe_for_hopper(tmp_path, head_dim, dtype):
    hopper = pytest.importorskip("svg_ear_compile.kernels.probe.hopper")
    check_hopper(tmp_path, hopper.probe_kernel, dtype, hopper.meta(head_dim), stack=0)


@pytest.mark.parametrize(
    ("blocks", "programs"), [(1182, 200), (512, 24), (278, 96), (116, 32), (1857, 192), (64, 1), (1, 1)]
)
def test_runs_of_key_blocks_fill_the_multiprocessors(blocks, programs):
    """Never longer than a program can take, never slower than the longest runs."""
    hopper = pytest.importorskip("svg_ear_compile.kernels.probe.hopper")
    run = hopper.run_length(blocks, programs, 132)
    assert run % 2 == 0
    assert 0 < run <= hopper.MOST_BLOCKS

    def steps(run):
        return triton.cdiv(programs * triton.cdiv(blocks, run), 132) * run

    assert steps(run) <= 1.06 * steps(hopper.MOST_BLOCKS)
    if (blocks, programs) == (
        512,
        24,
    ):  # 24 x 8 programs of 64 would be two waves, 24 x 11 of 48 are two as well
        assert steps(run) == 0.75 * steps(64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SMALL_KERNELS_ON, ids=named)
def test_routing(tmp_path, capability):
    kernels = [(triton_route.shift_kernel, triton_route.shift_meta(True), ())]
    kernels += [(triton_route.search_kernel, triton_route.search_meta(number), ()) for number in range(5)]
    kernels += [
        (triton_route.lists_kernel, triton_route.lists_meta(True, True, True), ("kept",)),
        (triton_route.lists_kernel, triton_route.lists_meta(False, True, False), ("codes", "state", "ties")),
        (triton_schedule.heaviest_first_kernel, triton_schedule.meta(), ()),
    ]
    for kernel, options, absent in kernels:
        check(compiled(kernel, capability, torch.bfloat16, options, None, absent), tmp_path, capability, None)


def test_hopper_uses_its_own_instructions(tmp_path):
    """The hot configuration: asynchronous matrix products, tiles by TMA, three of them in flight."""
    kernel = compiled_attention((9, 0), 128, torch.bfloat16, False, "attend")
    check(kernel, tmp_path, (9, 0), torch.bfloat16)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert "3x64x128xbf16" in kernel.asm["ttgir"]
