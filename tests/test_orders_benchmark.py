"""benchmarks/orders.py on toy models."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import import_benchmark
from test_quality_benchmark import toy_weights

SIZE = (4, 64, 64)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["hunyuan", "cogvideox"])
def test_all_blocks_kept_is_exact_and_few_err(model: str, tmp_path: Path) -> None:
    orders, weights = import_benchmark("orders"), toy_weights(model, tmp_path)
    dense, sparse = orders.compare([0.5], model, weights, SIZE, [1.0, 0.1], 64)
    ways = ("cubes", "splits", "kmeans", "cubes +", "splits +", "chosen", "chosen again", "by head")
    assert all(dense[way] < 1e-5 for way in ways), "the rows, the mask and the place of the text are right"
    assert all(1e-3 < sparse[way] < 1 for way in ways)
    assert sparse["by head"] <= min(sparse[way] for way in ways if way != "kmeans")


def test_orders_of_an_earlier_level_are_used_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = toy_weights("wan", tmp_path)
    import_benchmark("orders").main(
        f"--weights {weights} --noise .9,.899,.1 --size 4x64x64 --rows 64".split()
    )
    names, _, *lines = capsys.readouterr().out.splitlines()
    assert names.endswith("splits of 0.9    splits of 0.899")
    ratio_near, ratio_far = float(lines[1].split()[-1]), float(lines[2].split()[-2])
    assert len(lines) == 3
    assert len(lines[0].split()) == 11, "nothing to use again at the first level"
    assert ratio_near == pytest.approx(1, abs=0.05)
    assert abs(ratio_far - 1) > 0.05
