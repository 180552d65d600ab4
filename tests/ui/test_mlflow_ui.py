"""What a person sees: the charts in the System metrics tab of MLflow's own user interface, in a real Chromium."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from memtrack import metrics
from tests.integrations.mlflow_lab import SUMMARY, rows

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy", reason="needs the full mlflow, with its server")

CHROMIUM = "/usr/bin/chromium"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="needs chromium"),
]

TRAINING = """
import memtrack, mlflow
memtrack.autolog(interval=0.5, flush_interval=2)
with mlflow.start_run(run_name="a training") as run:
    with memtrack.phase("load"):
        data = []
        for part in range(10):
            data.append(bytearray(20 << 20))
            data[-1][::4096] = b"x" * len(data[-1][::4096])
            time.sleep(0.25)
    with memtrack.phase("train"):
        for step in range(32):
            memtrack.step(step)
            batch = bytearray((40 + 5 * step) << 20)
            batch[::4096] = b"x" * len(batch[::4096])
            mlflow.log_metric("loss", 1.0 / (step + 1), step=step)
            time.sleep(0.15)
            del batch
            time.sleep(0.1)
report(run_id=run.info.run_id, experiment_id=run.info.experiment_id)
"""


@pytest.fixture
def page(mlflow_server):
    """A page of a headless Chromium that reaches nothing but this machine; so tall that every chart is in view."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1500, "height": 4100})
        page.route(
            lambda url: urlsplit(url).hostname not in ("127.0.0.1", "localhost"),
            lambda route: route.abort(),
        )
        yield page
        browser.close()


def expected_charts(recording):
    """The keys of the default charts that were measured."""
    found = {name for row in rows(recording) for name in row.cells if metrics.selected(name, "default")}
    return {f"system/{name}" for name in found | {metrics.peak_name(name) for name in found if metrics.has_peak(name)}}


def open_tab(page, server, run, tab, first):
    """Show a tab of a run, and wait until its charts are drawn, which happens when they come into view."""
    page.goto(f"{server.uri}/#/experiments/{run['experiment_id']}/runs/{run['run_id']}/{tab}")
    page.wait_for_selector(f'h4[title="{first}"]', timeout=60_000)
    page.keyboard.press("Escape")
    for close in page.locator('button[aria-label*="lose"]').all():
        if close.is_visible():
            close.click()
    page.wait_for_function(
        """() => [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')]
                 .every(card => card.querySelector('.js-line, .bars .point'))""",
        timeout=60_000,
    )
    page.wait_for_timeout(500)


def screenshot(page, name):
    """Keep a picture of the whole page."""
    folder = Path(os.environ.get("MEMTRACK_TEST_ARTIFACTS", "test-artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / name, full_page=True)


def drawn_charts(page):
    """Title -> the vertices of its line, for each chart that is drawn."""
    lines = page.evaluate(
        """() => [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')].map(card =>
                 [card.querySelector('h4').title, card.querySelector('.js-line')?.getAttribute('d') ?? '',
                  card.innerText])"""
    )
    assert not any("No data" in text for *_, text in lines)
    return {title: re.findall(r"[-\d.]+,[-\d.]+", path) for title, path, _ in lines}


def test_the_charts_as_a_person_sees_them(page, mlflow_server, train):
    """Each default chart stands in the System metrics tab, under its scope, with its name and a line over time.

    So do the final figures that runs are sorted by. The Model metrics tab is the user's: nothing of ours is in it.
    """
    done = train(TRAINING, mlflow_server)
    charts = expected_charts(done.recording)
    assert len(charts) >= 12
    process = f"system/{metrics.RSS}"

    open_tab(page, mlflow_server, done.result, "system-metrics", process)
    screenshot(page, "mlflow_system_metrics.png")
    drawn = drawn_charts(page)
    figures = {title: vertices for title, vertices in drawn.items() if title.startswith(SUMMARY)}
    assert f"{SUMMARY}peak_rss_mib" in figures
    assert set(drawn) - set(figures) == charts
    windows = len(rows(done.recording))
    assert windows >= 16
    for title in charts:
        vertices = drawn[title]
        # MLflow leaves out vertices that lie on a straight line
        assert len(vertices) >= 2, title
        assert len({vertex.partition(",")[0] for vertex in vertices}) >= 2, title
    assert len(drawn[process]) >= 12
    text = page.inner_text("body")
    for scope in {key.rpartition("/")[0] for key in charts}:
        count = sum(key.rpartition("/")[0] == scope for key in charts)
        assert re.search(rf"{scope}\s*\({count}\)", text), scope
    assert text.count("Time\n") >= len(charts)

    open_tab(page, mlflow_server, done.result, "model-metrics", "loss")
    screenshot(page, "mlflow_model_metrics.png")
    assert set(drawn_charts(page)) == {"loss"}
