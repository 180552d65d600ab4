"""A picture of MLflow's System metrics tab with the charts of the demo: a real training, server and browser.

python -m tests.ui.mlflow_picture examples/pictures/mlflow_system_metrics.png
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from memtrack import metrics
from tests.integrations.mlflow_lab import SUMMARY, Server, environment
from tests.ui.test_mlflow_ui import CHROMIUM, drawn_charts, open_tab

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 1400, 4600
SIDEBAR = 200
CHARTS = 14


def record(folder: Path) -> tuple[Path, dict[str, str]]:
    """Run the demo in a folder, as a user would; where its store is, and the ids of experiment and run."""
    kept = {name: text for name, text in environment().items() if not name.startswith("MEMTRACK_")}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--seconds", "40"]
    done = subprocess.run(command, cwd=folder, env=kept, check=True, capture_output=True, text=True)
    found = re.search(r"experiments/(?P<experiment_id>\w+)/runs/(?P<run_id>\w+)/", done.stdout)
    assert found is not None
    return folder / ".memtrack" / "demo", found.groupdict()


def shoot(server: Server, run: dict[str, str], path: Path) -> None:
    """The tab with all of memtrack's charts, each of them drawn; the final figures are folded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.route(lambda url: not url.startswith(server.uri), lambda route: route.abort())
        open_tab(page, server, run, "system-metrics", f"system/{metrics.RSS}")
        drawn = {title: line for title, line in drawn_charts(page).items() if not title.startswith(SUMMARY)}
        assert len(drawn) == CHARTS, sorted(drawn)
        assert all(len(vertices) >= 2 for vertices in drawn.values()), "a chart without a line"
        page.get_by_text("system/memory/summary").first.click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        boxes = [card.bounding_box() for card in page.get_by_test_id("experiment-view-compare-runs-card").all()]
        assert len(boxes) == CHARTS
        bottom = max(box["y"] + box["height"] for box in boxes if box is not None)
        page.screenshot(
            path=os.fspath(path), clip={"x": SIDEBAR, "y": 0, "width": WIDTH - SIDEBAR, "height": bottom + 10}
        )
        browser.close()


def main() -> None:
    from PIL import Image

    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        store, run = record(Path(folder))
        server = Server(store)
        server.start()
        try:
            shoot(server, run, path)
        finally:
            server.stop()
    with Image.open(path) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
