"""The report as a web page: self-contained, safe with any name, and with the figures of the JSON."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from reporting.by_hand import graph, log, site

from svg_ear_compile.kernels.context import Measure, SiteTotals
from svg_ear_compile.reporting import GraphRecord, Report, report
from svg_ear_compile.runtime.density import Decision

HOSTILE = "</script></style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\""


def record(layers: int = 3, steps: int = 6, dense: int = 2, **changes: Any) -> GraphRecord:
    """A generation in which the last layer misses its target of 0.04."""
    found = graph(site(0, **changes), site(1, "TOO_FEW_TOKENS"), options={"target_error": 0.04})
    for step in range(steps):
        warm_up = Decision("step 1 of 2 dense warm-up steps", counter="warm-up steps")
        decision = warm_up if step < dense else Decision(density=0.05 * (1 + step))
        logs = [
            log(layer, step, decision, None if step < dense else 0.03 * (layer + 1))
            for layer in range(layers)
        ]
        for entry in logs:
            entry.end = 10.0 + (4.0 * step if step < dense else 2.0 * step + 2.0)
            found.count({0: "warm-up steps"} if step < dense else {}, 1, [entry])
    found.totals_on("cpu")[0] = SiteTotals(torch.tensor([300, 330]), 1200)
    return found


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def hostile() -> Report:
    """Every string that a model or an error may bring."""
    found = record(
        module_path=HOSTILE, module_class=HOSTILE, mask=HOSTILE, sentence=HOSTILE, hint=HOSTILE, q_len=HOSTILE
    )
    found.failure = found.steps = HOSTILE
    found.other_attention, found.graph_breaks, found.kernels = [HOSTILE], [HOSTILE], [HOSTILE]
    found.fallbacks[HOSTILE] += 1
    found.resolved.settings.__dict__["sites"] = (HOSTILE,)
    return report([found])


def test_it_asks_nothing_of_the_network_and_runs_nothing() -> None:
    page = report([record()]).to_html()
    tags = Page(page).tags
    assert {tag for tag, _ in tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    )
    assert not [
        name
        for _, attrs in tags
        for name in attrs
        if name in ("src", "href", "srcset") or name.startswith("on")
    ]
    assert not re.search(r"url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_names_are_escaped() -> None:
    plain, attacked = Page(report([record()]).to_html()), Page(hostile().to_html())
    assert {tag for tag, _ in attacked.tags} <= {tag for tag, _ in plain.tags}
    assert attacked.text.count(HOSTILE) >= 9
    assert HOSTILE not in hostile().to_html()
    assert html.escape(HOSTILE) in hostile().to_html()


def test_it_says_what_the_json_says() -> None:
    shown = report([record()])
    data, text = json.loads(shown.to_json()), " ".join(Page(shown.to_html()).text.split())
    totals, time = data["totals"], data["time"]
    assert (totals["rewritten"], totals["sites"]) == (1, 2)
    computed = 4 * 1024 * 1024 * 64 * 2 * (6 + 12 * 0.25)
    assert totals["flops_computed"] == computed
    assert totals["flops_of_calls"] == computed * 18 / 9
    assert "1 of 2" in text
    assert "50.0% of these sites' FLOPs were computed" in text
    assert [step["seconds"] for step in time["steps"]] == pytest.approx([4, 2, 2, 2, 2])
    assert (time["dense_step_seconds"], time["sparse_step_seconds"]) == pytest.approx((4, 2))
    assert "seconds for a sparse step; 4 for a dense one (2.00x)" in text
    assert "lower min_tokens" in text
    assert not any(step["trials"] for step in time["steps"])
    assert "target_error 0.04 options" in text
    assert torch.__version__ in text
    assert data["versions"]["torch"] == torch.__version__
    assert data["peak_memory_gib"]["process"] > 0.05


def test_a_step_of_trials_does_not_count_as_a_dense_one() -> None:
    found, trial = record(), Decision("step 2 of 2", measure=Measure(0, (0.15, 0.45)))
    found.count({0: "warm-up steps"}, 1, [replace(log(0, 1, trial), end=14.0)])
    shown = report([found])
    time = json.loads(shown.to_json())["time"]
    assert [step["trials"] for step in time["steps"]] == [True, False, False, False, False]
    assert (time["dense_step_seconds"], time["sparse_step_seconds"]) == (None, pytest.approx(2))
    assert "for a dense one" not in shown.to_html()


def test_the_maps_have_a_cell_for_each_call() -> None:
    page = report([record()]).to_html()
    density, error = re.findall(r'<svg role="img" aria-label="(?:density|measured).*?</svg>', page)
    cells = {
        name: {
            kind: drawn.count("M") for kind, drawn in re.findall(r'<path class="(\w+)" d="([^"]+)"', picture)
        }
        for name, picture in (("density", density), ("error", error))
    }
    assert cells["density"] == {"dense": 6, "in2": 3, "in3": 3, "in4": 6}, "0.15, 0.2, 0.25 and 0.3"
    assert cells["error"] == {"dense": 6, "in5": 4, "over0": 4, "over2": 4}, (
        "0.75, 1.5 and 2.25 of the target"
    )


def test_without_calls_and_without_sites() -> None:
    for records in ([], [graph()], [graph(site(0))], [graph(site(0, "CROSS"))]):
        assert "svg-ear report" in Page(report(records).to_html()).text


def test_the_ending_says_which(tmp_path: Path) -> None:
    for name, begins in (("r.html", "<!doctype html>"), ("r.json", "{")):
        report([record()]).write(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1100])
def test_in_a_browser_no_name_runs_and_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    look = "<script>document.body.dataset.wide = document.documentElement.scrollWidth</script></body>"
    page.write_text(hostile().to_html().replace("</body>", look))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--dump-dom",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert "<title>svg-ear report</title>" in done.stdout
    (wide,) = re.findall(r'data-wide="(\d+)"', done.stdout)
    assert int(wide) <= max(width, 500), "headless Chromium has no smaller windows"
