"""What the host says about a call: to its own thread, and until the call is over."""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.nn.functional as F
from op_calls import CONSTANTS, decided, inputs, merged
from torch import Tensor

from svg_ear_compile.kernels import context


def test_threads_do_not_see_each_other() -> None:
    tensors = inputs(200)
    dense = F.scaled_dot_product_attention(*tensors)
    sparse = merged(*tensors, None, CONSTANTS)
    assert not torch.equal(dense, sparse)
    both_inside = threading.Barrier(2)
    results: dict[bool, Tensor] = {}

    def work(is_dense: bool) -> None:
        torch.set_num_threads(1)
        call = decided(CONSTANTS, dense="a test" if is_dense else "")
        with context.active(call):
            both_inside.wait(timeout=30)
            results[is_dense] = merged(*tensors, None, CONSTANTS)
            both_inside.wait(timeout=30)
            assert context.current() is call

    threads = [threading.Thread(target=work, args=(x,)) for x in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[True], dense)
    assert torch.equal(results[False], sparse)
    assert not context.inside()


def test_contexts_nest_and_end_with_an_error() -> None:
    outer, inner = context.RunContext(), context.RunContext()
    with context.active(outer):
        with contextlib.suppress(ZeroDivisionError), context.active(inner):
            assert context.current() is inner
            raise ZeroDivisionError
        assert context.current() is outer
    assert context.current() is not outer
