"""A picture of W&B's terminal UI with memtrack's series: a real training, W&B's own program, a terminal, a PNG.

    python -m tests.ui.leet_picture examples/pictures/wandb_leet.png

The terminal UI draws one line through all points of a chart, whatever their labels, and tells seconds apart. Through
the points of the process and its workers (W&B's own process is one) that is a band, from the smallest to the largest.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.integrations.mlflow_lab import scripts
from tests.integrations.wandb_lab import folders, in_folder, read_run, screen_of

ROWS, COLUMNS = 34, 140
TITLE = "Process Memory (B)"
LAYOUT = {"system_grid": {"rows": 1, "cols": 1}, "metrics_grid": {"rows": 1, "cols": 1}}
"""As the user would set it with ``wandb leet config``: one chart of each kind, as large as can be."""

TRAINING = """
import memtrack, random, subprocess, wandb

# every window, so that the band is whole
memtrack.autolog(
    interval=0.1, flush_interval=0.5, selective=False, metrics=["memory/process/rss_mib", "memory/worker"]
)
LOADER = '''
import sys, time
kept, keeps, step = [], float(sys.argv[1]), 0
while True:
    # batches come and go, and some of what they were made of stays
    batch = b"1" * ((5 + 40 * (step % 4)) << 20)
    kept.append(b"1" * int(keeps * (1 << 20)))
    time.sleep(1)
    step += 1
'''
run = wandb.init(project="memtrack", name="demo", settings=wandb.Settings(x_disable_stats=True))
with memtrack.phase("load"):
    data = []
    for part in range(25):
        data.append(b"1" * (10 << 20))
        time.sleep(SECONDS / 150)
with memtrack.phase("train"):
    loaders = [subprocess.Popen([sys.executable, "-c", LOADER, keeps]) for keeps in ("0", "12")]
    noise = random.Random(1)
    for step in range(150):
        memtrack.step(step)
        run.log({"loss": 2.3 * 0.97**step + 0.1 * noise.random()})
        time.sleep(SECONDS / 180)
for loader in loaders:
    loader.kill()
    loader.wait()
report(run_id=run.id)
run.finish()
"""


def record(folder: Path, seconds: float) -> tuple[Path, Any]:
    """Train so long with W&B offline, process and two workers measured; the folder of the run, and what is in it."""
    with scripts(folder) as train:
        done = in_folder(train, folder)(f"SECONDS = {seconds}\n{TRAINING}")
    run_id = done.result["run_id"]
    run = read_run(folder, run_id)
    (path,) = folders(folder, run_id)
    return path, run


def show(path: Path, settings: Path) -> Any:
    """The screen of a terminal in which W&B shows a run, once nothing changes any more. ``settings`` is a folder."""

    settings.mkdir()
    (settings / "wandb-leet.json").write_text(json.dumps(LAYOUT))
    colours = {"COLORTERM": "truecolor", "WANDB_CONFIG_DIR": str(settings)}
    return screen_of(path, rows=ROWS, columns=COLUMNS, until=TITLE, **colours)


# -- the screen as a picture ----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 9, 18
PAPER, INK = "#16181d", "#d5d8de"
DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
"""Column and row of each bit of a braille character."""


def paint(screen: Any, path: Path) -> None:
    """Draw a screen in its own colours. The dots of braille are drawn by hand: monospaced fonts often lack them."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), 14)
    image = Image.new("RGB", (WIDTH * screen.columns, HEIGHT * screen.lines), PAPER)
    draw = ImageDraw.Draw(image)
    for row in range(screen.lines):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            ink, paper = _colour(cell.fg, INK), _colour(cell.bg, PAPER)
            if cell.reverse:
                ink, paper = paper, ink
            left, top = WIDTH * column, HEIGHT * row
            if paper != PAPER:
                draw.rectangle((left, top, left + WIDTH - 1, top + HEIGHT - 1), paper)
            code = ord(cell.data[0]) if cell.data else 32
            if 0x2800 <= code <= 0x28FF:
                for bit, (right, down) in enumerate(DOTS):
                    if code >> bit & 1:
                        x, y = left + 1 + 4 * right, top + 2 + 4 * down
                        draw.rectangle((x, y, x + 2, y + 2), ink)
            elif code != 32:
                draw.text((left, top), cell.data, ink, font)
    image.quantize(64).save(path, optimize=True)


def _colour(name: str, default: str) -> str:
    """A colour of the terminal emulator's: six hexadecimal digits, or a name."""
    if name == "default":
        return default
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else {"brown": "#b58900"}.get(name, name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, _ = record(Path(folder), 45.0)
        paint(show(path, Path(folder) / "settings"), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
