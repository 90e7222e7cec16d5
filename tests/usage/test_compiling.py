"""Compiled twice, copied, pickled, exported, by two threads, in other processes."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyInputs, ToyVideo, calls, compiled
from usage.wan import DENSITY_1, LAYERS, ROUNDING, SPARSE_3, error

import svg_ear_compile

pytestmark = [pytest.mark.usefixtures("fresh"), pytest.mark.filterwarnings("error:svg_ear")]


def planned() -> list[float | None]:
    """The densities of the rewritten sites."""
    return [site.planned_density for site in svg_ear_compile.report().sites if site.decision.rewritten]


def test_compiled_twice_over(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    expected = toy(*toy_inputs())
    run = compiled(compiled(toy, DENSITY_1), DENSITY_1)
    assert error(run(*toy_inputs()), expected) < ROUNDING
    toy.compile(backend="svg_ear", options=DENSITY_1)
    assert error(toy(*toy_inputs()), expected) < ROUNDING
    assert calls() == (2 * LAYERS, {}), "once a layer and call, not twice"


def test_one_model_compiled_with_two_settings(toy: ToyVideo, toy_inputs: ToyInputs) -> None:
    expected = toy(*toy_inputs())
    exact, sparse = compiled(toy, DENSITY_1), compiled(toy, SPARSE_3)
    first, other, again = exact(*toy_inputs()), sparse(*toy_inputs()), exact(*toy_inputs())
    assert error(first, expected) < ROUNDING
    assert torch.equal(first, again)
    assert error(other, expected) > ROUNDING
    assert planned() == [1.0] * LAYERS + [0.3] * LAYERS
    assert calls() == (3 * LAYERS, {})


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_a_compiled_model_can_be(toy: ToyVideo, toy_inputs: ToyInputs, again: Any) -> None:
    run = compiled(toy, DENSITY_1)
    expected = run(*toy_inputs())
    other = again(run)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    assert torch.equal(run(*toy_inputs()), expected), "the copy is another model"
    assert error(other(*toy_inputs()), other._orig_mod(*toy_inputs())) < ROUNDING
    assert calls() == (3 * LAYERS, {})


def test_export_is_untouched(toy: ToyVideo, toy_inputs: ToyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVG_EAR", "1")
    compiled(toy, DENSITY_1)(*toy_inputs())
    exported = torch.export.export(toy, toy_inputs())
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 2 * LAYERS
    assert not any("svg_ear" in target for target in targets)


def test_two_threads_compile_and_run_at_once(toy_inputs: ToyInputs) -> None:
    """Each has its model, its clock, its context: one's warm-up is not the other's."""
    models = [ToyVideo(layers=2).eval(), ToyVideo(layers=3).eval()]
    timesteps = (999, 800, 500, 200)
    expected = [[model(*toy_inputs(t, seed=i)) for t in timesteps] for i, model in enumerate(models)]
    errors: dict[int, list[float]] = {}
    together = threading.Barrier(len(models))

    def work(i: int) -> None:
        with torch.no_grad():
            run = compiled(models[i], {**SPARSE_3, "dense_steps": i + 1})
            errors[i] = []
            for t, dense in zip(timesteps, expected[i], strict=True):
                together.wait(60)
                errors[i].append(error(run(*toy_inputs(t, seed=i)), dense))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sparse = {i: [e > ROUNDING for e in found] for i, found in errors.items()}
    assert sparse == {0: [False, True, True, True], 1: [False, False, True, True]}
    assert calls() == (2 * 3 + 3 * 2, {"warm-up steps": 2 * 1 + 3 * 2})


WORKERS = """
import multiprocessing
import torch
from toy import ToyInputs, ToyVideo, compiled
from usage.test_compiling import worker
from usage.wan import DENSITY_1

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    model = ToyVideo().eval()
    run = compiled(model, DENSITY_1)
    run(*ToyInputs()())
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        answers = context.Queue()
        process = context.Process(target=worker, args=(run, answers))
        process.start()
        print(method, *answers.get(timeout=60))
        process.join()
        assert process.exitcode == 0
"""


def worker(run: Any, answers: Any) -> None:
    """In another process: (whether it is right, sparse calls counted here)."""
    with torch.no_grad():
        out, expected = run(*ToyInputs()()), run._orig_mod(*ToyInputs()())
    answers.put((error(out, expected) < ROUNDING, calls()[0]))


@pytest.mark.slow
def test_workers_forked_and_spawned(tmp_path: Path) -> None:
    """A forked worker goes on with what was compiled and counted; a spawned one compiles what it was sent."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SVG_EAR")}
    environ |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"fork True {2 * LAYERS}", f"spawn True {LAYERS}"]
