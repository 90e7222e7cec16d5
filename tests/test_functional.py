"""svg_ear_compile.attention: the op as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile import attention
from svg_ear_compile.functional import OWN_CALL
from svg_ear_compile.kernels import context, planning, reference
from svg_ear_compile.kernels.constants import SiteConstants

B, H, D, TEXT = 2, 2, 32, 40
GRID = (4, 12, 20)
VIDEO = 4 * 12 * 20


def qkv(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, tokens, D, generator=random).to(device, dtype) for _ in range(3)]


def padding(tokens: int, *lengths: int) -> Tensor:
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None])[:, None, None]


def assert_accurate(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """FlashAttention's rule: at most twice the error of the plain formula in the same precision, plus a rounding."""
    error, allowed = ((x.double() - want).abs().max() for x in (got, plain))
    assert error <= 2 * allowed + torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", [None, "torch", "reference"])
@pytest.mark.parametrize("num_text", [0, TEXT])
def test_density_1_is_dense_attention(dtype: torch.dtype, impl: Any, num_text: int) -> None:
    q, k, v = qkv(VIDEO + num_text, dtype)
    out = attention(q, k, v, grid=GRID, num_text=num_text, density=1, impl=impl)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_accurate(out, reference.dense(q, k, v), F.scaled_dot_product_attention(q, k, v))


def plan_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: Any, num_text: int) -> Any:
    constants = SiteConstants(
        None, num_text, False, list(grid or ()), "auto", "output_error", True, 0.3, seed=0, site=OWN_CALL
    )
    return planning.make_plan(q, k, v, mask, constants)


@pytest.mark.parametrize(
    ("dtype", "grid", "num_text", "masked"),
    [
        (torch.float32, GRID, 0, False),
        (torch.float32, GRID, TEXT, True),
        (torch.float32, None, TEXT, True),
        (torch.bfloat16, GRID, TEXT, False),
        (torch.bfloat16, None, 0, True),
    ],
)
def test_it_is_the_joint_softmax_of_its_plan(
    dtype: torch.dtype, grid: Any, num_text: int, masked: bool
) -> None:
    tokens = VIDEO + num_text
    q, k, v = qkv(tokens, dtype)
    mask = padding(tokens, tokens - 7, tokens) if masked else None
    arguments = {"grid": grid, "num_text": num_text, "density": 0.3, "mask": mask}
    out = attention(q, k, v, **arguments)
    plan = plan_of(q, k, v, mask, grid, num_text)
    want, plain = (reference.joint_softmax(q, plan, D**-0.5, x) for x in (torch.float64, dtype))
    assert_accurate(out, want, plain)
    assert_accurate(attention(q, k, v, **arguments, impl="reference"), want, plain)
    assert torch.equal(attention(q, k, v, **arguments, impl="torch"), out)
    dense = reference.dense(q, k, v, mask)
    assert (want - dense).abs().max() > 1e-2, "blocks were skipped"


def test_hidden_keys_do_not_matter() -> None:
    q, k, v = qkv(VIDEO)
    mask = padding(VIDEO, VIDEO - 100)
    out = attention(q, k, v, density=0.3, mask=mask)
    k[:, :, -100:], v[:, :, -100:] = 1e4, torch.nan
    assert torch.equal(attention(q, k, v, density=0.3, mask=mask), out)


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_one_graph(dynamic: bool) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return 2 * attention(q, k, v, density=0.3, num_text=TEXT, mask=mask)

    run = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for tokens in (VIDEO, VIDEO + 64):
            arguments = (*qkv(tokens), padding(tokens, tokens - 3))
            torch.testing.assert_close(run(*arguments), f(*arguments), rtol=0, atol=0)


def test_in_a_call_of_a_compiled_graph_it_shares_nothing() -> None:
    """Neither the orders of another call, nor what another call's mask shows."""
    arguments = [qkv(tokens, seed=tokens) for tokens in (VIDEO, VIDEO, VIDEO + 8)]
    masks = [padding(x[0].shape[2], hidden) for x, hidden in zip(arguments, (900, 960, 500), strict=True)]
    cases = list(zip(arguments, masks, strict=True))
    alone = [attention(*x, density=0.3, mask=mask) for x, mask in cases]
    with context.active(context.RunContext(context.Decisions(strict=True))):
        for (x, mask), want in zip(cases, alone, strict=True):
            assert torch.equal(attention(*x, density=0.3, mask=mask), want)


def changed(**arguments: Any) -> Callable[[], Tensor]:
    q, k, v = qkv(VIDEO)
    given = {"query": q, "key": k, "value": v, "grid": GRID, **arguments}
    return lambda: attention(given.pop("query"), given.pop("key"), given.pop("value"), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": torch.randn(H, VIDEO, D)}, r"must all be \[batch, heads, tokens, head_dim\].*cross attention"),
        ({"key": torch.randn(B, H, 77, D)}, "cross attention use torch.nn.functional"),
        ({"value": torch.randn(B, 1, VIDEO, D)}, "must all be"),
        ({"key": torch.randn(B, H, VIDEO, D).half()}, r"one dtype.*cast or move them with \.to\(\)"),
        ({name: torch.randn(B, H, VIDEO, D).double() for name in ("query", "key", "value")}, "torch.float64"),
        ({name: torch.randn(B, H, VIDEO, 8) for name in ("query", "key", "value")}, "head_dim is 8: 16 to 256"),
        ({name: torch.randn(B, H, VIDEO, 264) for name in ("query", "key", "value")}, "head_dim is 264"),
        ({"query": torch.randn(B, H, VIDEO, D, requires_grad=True)}, r"call it under torch.no_grad\(\)"),
        ({"grid": (4, 12, 21)}, r"grid \(4, 12, 21\) and num_text 0 make 1008 tokens, not 960"),
        ({"grid": (80, 12)}, r"pass grid=\(frames, height, width\)"),
        ({"num_text": 5}, "num_text 5 make 965 tokens, not 960"),
        ({"num_text": -1}, "num_text is -1"),
        ({"num_text": VIDEO + 1, "grid": None}, "num_text is 961 of 960 tokens"),
        ({"density": 0}, "density is 0: pass a share above 0, and at most 1"),
        ({"density": 1.5}, "density is 1.5"),
        ({"mask": torch.ones(B, 1, 1, VIDEO)}, r"mask is torch.float32 .*pass bool \[batch or 1, 1, 1, 960\]"),
        ({"mask": torch.ones(B, VIDEO, dtype=torch.bool)}, "True for keys that may be attended to"),
        ({"mask": torch.ones(3, 1, 1, VIDEO, dtype=torch.bool)}, r"\[3, 1, 1, 960\]"),
        ({"impl": "triton"}, "impl is 'triton': pass None, 'torch' or 'reference'"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**arguments)()


def test_torch_elsewhere_than_on_a_cpu() -> None:
    q, k, v = (x.to("meta") for x in qkv(VIDEO))
    with pytest.raises(ValueError, match="impl='torch' runs on a CPU, not on meta: leave impl out"):
        attention(q, k, v, impl="torch")
