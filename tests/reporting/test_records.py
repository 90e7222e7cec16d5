"""What a record counts, how long it lives, and that threads may read it."""

from __future__ import annotations

import gc
import threading
import weakref

import torch
from reporting.by_hand import graph, log, site

from svg_ear_compile.kernels.context import Measure, SiteTotals
from svg_ear_compile.precedence import resolve
from svg_ear_compile.reporting import records, report
from svg_ear_compile.runtime.density import Decision


def test_flops() -> None:
    dense = 4 * 2 * 64 * 1024 * 1024
    assert site().flops_dense == dense
    assert site().flops_planned(0.25) == dense // 4
    assert site().flops_planned(None) == dense
    assert site(reason="CROSS").flops_planned(0.25) == dense
    with_text = site(num_text=24, q_hint=1024)
    assert with_text.flops_planned(0.5) == 4 * 2 * 64 * (1024**2 - 1000**2 // 2)


def test_of_several_generations_the_last_is_shown_and_a_few_are_kept() -> None:
    record = graph(site())
    for generation in range(12):
        record.count({}, generation, [log(0, generation, Decision(density=0.4, measure=Measure(0)), 0.02)])
    assert [e.step for e in report([record]).errors()] == [11]
    assert len(record.logs) == records.MAX_GENERATIONS
    assert record.sparse[0] == 12


def test_it_may_be_read_while_another_thread_counts() -> None:
    record, stop = graph(site()), threading.Event()

    def count() -> None:
        generation = 0
        while not stop.is_set():
            generation += 1
            record.totals_on(("cpu", generation))[0] = SiteTotals(torch.tensor([1, 1]), 1)
            record.count({}, generation, [log(0, 0, Decision(density=0.4, measure=Measure(0)), 0.02)])

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(20):
            str(report([record]))
    finally:
        stop.set()
        thread.join()
    assert record.sparse[0]


def test_records_live_as_long_as_their_callables() -> None:
    def owner() -> None: ...

    def other() -> None: ...

    first, second = records.new_record(resolve({}, {})), records.new_record(resolve({}, {}))
    first.owner = weakref.ref(owner)
    second.owner = weakref.ref(other)
    assert records.live_records() == [first, second]
    del owner
    gc.collect()
    assert records.live_records() == [second]
    records.drop(second)
    assert records.live_records() == []
