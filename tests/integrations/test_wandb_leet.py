"""W&B's terminal UI draws memtrack's series."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integrations.wandb_lab import chart, draw, folders, read_run

pytest.importorskip("wandb")

ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"

TRAINING = """
import memtrack, subprocess, wandb
memtrack.autolog(interval=0.1, flush_interval=0.2, metrics="all")
# nothing of W&B's own stands in these charts
run = wandb.init(project="p", name="demo", settings=wandb.Settings(x_disable_stats=True))
worker = None
if len(sys.argv) == 1:
    code = "import time; data = b'1' * (300 << 20); print(1, flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    worker.stdout.readline()
for step in range(30):
    run.log({"loss": 1 / (step + 1)})
    time.sleep(0.1)
report(run_id=run.id)
run.finish()
if worker is not None:
    worker.kill()
"""


def test_terminal_ui_draws_process_and_worker(wandb_train, tmp_path):
    """The chart of process memory reaches down to the process and up to its worker, and there is no other writer."""
    done = wandb_train(TRAINING)
    run = read_run(tmp_path, done.result["run_id"])
    assert run.own_keys == set()
    process = [value for _, value in run.series["proc.memory.rssMB/l:memtrack"]]
    workers = [value for key in run.series if "/l:worker-" in key for _, value in run.series[key]]
    assert max(workers) > 300 > max(process)
    (folder,) = folders(tmp_path, done.result["run_id"])
    lines = draw(folder)
    ARTIFACTS.mkdir(exist_ok=True)
    (ARTIFACTS / "wandb_leet.txt").write_text("\n".join(lines) + "\n")
    drawn = chart(lines, "Process Memory (B)")
    top, bottom = (float(number) for number in re.findall(r"([0-9.]+)(?:MiB)?[│└]", "\n".join(drawn)))
    assert top > max(workers) > max(process) > bottom
    dots = [sum(0x2800 < ord(character) <= 0x28FF for character in line) for line in drawn]
    assert sum(dots) >= 6, "nothing is drawn in it"
