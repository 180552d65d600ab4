"""What the tests of the Trainer and of accelerate share."""

from __future__ import annotations

from memtrack import metrics
from memtrack.recording.reader import RecordingReader
from tests.integrations.mlflow_lab import rows

QUIET = {"HF_HUB_OFFLINE": "1", "USE_TF": "0", "TF_CPP_MIN_LOG_LEVEL": "3", "COMET_DISABLE_AUTO_LOGGING": "1"}
"""For the environment of a script: nothing is fetched, and of what happens to be installed nothing more is loaded."""

HOLD = """
import warnings
warnings.simplefilter("ignore")
import numpy
HELD = []
def hold(mib):
    with open("/proc/self/statm") as file:
        before_mib = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    since = time.time()
    block = numpy.ones(mib << 17)
    time.sleep(0.3)
    HELD.append([since, time.time(), before_mib])
    return block[0]
"""
"""For a script: ``hold(mib)`` holds memory for a third of a second, and notes in ``HELD`` when, and what there was."""


def spikes(recording, held):
    """``(phase, step, epoch) -> MiB`` of the highest point in each time in which something was held."""
    with RecordingReader(str(recording)) as reader:
        names = reader.names()
    cells = [
        (row.end_wall_ns - row.end_ns, row.cells[metrics.RSS]) for row in rows(recording) if metrics.RSS in row.cells
    ]
    found: dict[tuple[str, int, int], float] = {}
    for since, until, before_mib in held:
        # by the time of the maximum: a window may have the end of one and the beginning of the next
        while_held = [cell for shift_ns, cell in cells if since <= (cell.max_ns + shift_ns) / 1e9 <= until]
        peak = max(while_held, key=lambda cell: cell.max)
        found[names[peak.phase], peak.step, peak.epoch] = peak.max - before_mib
    return found
