"""Single costs of memtrack, each measured in a process of its own. Run by overhead.py.

    python micro.py calls | idle | import | start

prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import timeit
from typing import TYPE_CHECKING

from tests.benchmarks.readings import memory

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 100_000


def per_call_ns(call: Callable[[], object], calls: int = CALLS) -> float:
    """The median of single calls, less what reading the clock costs."""
    clock = time.perf_counter_ns
    times = []
    empty = []
    for _ in range(calls):
        began = clock()
        call()
        times.append(clock() - began)
        began = clock()
        empty.append(clock() - began)
    return statistics.median(times) - statistics.median(empty)


def mean_ns(statement: str, names: dict[str, object]) -> float:
    """The best mean of five loops, less the empty loop."""
    best = min(timeit.repeat(statement, globals=names, number=CALLS, repeat=5))
    empty = min(timeit.repeat("pass", globals=names, number=CALLS, repeat=5))
    return (best - empty) / CALLS * 1e9


def calls() -> dict[str, float]:
    """Steps and phases while an agent watches."""
    import memtrack

    step, phase = memtrack.step, memtrack.phase
    with memtrack.start() as monitor:
        monitor.wait_ready()
        names = {"step": step, "phase": phase}
        found = {
            "step_ns": per_call_ns(lambda: step(7)) - per_call_ns(lambda: None),
            "step_mean_ns": mean_ns("step(7)", names),
            "phase_block_mean_ns": mean_ns("with phase('train'): pass", names),
        }
        found["phase_ns"] = _entering_ns(phase)
        found["step_cold_ns"] = _cold_ns(lambda: step(7)) - _cold_ns(lambda: None)
    return found


def _entering_ns(phase: Callable[[str], object]) -> float:
    """Making and entering a phase; leaving it is not in the time."""
    clock = time.perf_counter_ns
    times = []
    empty = []
    for _ in range(CALLS):
        began = clock()
        with phase("train"):  # type: ignore[attr-defined]
            times.append(clock() - began)
        began = clock()
        empty.append(clock() - began)
    return statistics.median(times) - statistics.median(empty)


def _cold_ns(call: Callable[[], object], calls: int = 300) -> float:
    """As in a training loop, where the caches are full of something else by the time of the next step."""
    import numpy as np

    clock = time.perf_counter_ns
    other = np.ones(64 << 20, dtype=np.uint8)
    times = []
    for _ in range(calls):
        other += 1
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times)


def idle() -> dict[str, float]:
    """The same where nothing is monitoring."""
    import memtrack

    step, phase = memtrack.step, memtrack.phase
    names = {"step": step, "phase": phase}
    return {
        "idle_step_ns": mean_ns("step(7)", names),
        "idle_phase_block_ns": mean_ns("with phase('train'): pass", names),
    }


def importing() -> dict[str, float]:
    """Memory and time of the import, beyond numpy, and of the functions once they are used."""
    import numpy  # noqa: F401 - the process to compare with

    memory("self")
    before = memory("self")
    began = time.perf_counter()
    import memtrack

    imported = time.perf_counter()
    after = memory("self")
    memtrack.step(0)
    used = memory("self")
    return {
        "import_ms": 1000 * (imported - began),
        "import_uss_mib": after.uss - before.uss,
        "first_use_uss_mib": used.uss - before.uss,
    }


def start() -> dict[str, float]:
    """How long the caller waits for the monitor to start, in a process with 300 MiB; and what it adds to it.

    That is counted in pages written to: the library's pages cease to be unique as soon as the agent maps them too.
    """
    import numpy as np

    data = np.ones(300 << 17)
    memory("self")
    before = memory("self")
    began = time.perf_counter()
    import memtrack

    monitor = memtrack.start()
    first = time.perf_counter() - began
    after = memory("self")
    monitor.wait_ready()
    ready = time.perf_counter() - began
    monitor.stop()
    again = []
    for _ in range(5):
        began = time.perf_counter()
        monitor = memtrack.start()
        again.append(time.perf_counter() - began)
        monitor.wait_ready()
        monitor.stop()
    del data
    return {
        "start_first_ms": 1000 * first,
        "start_ready_ms": 1000 * ready,
        "start_again_ms": 1000 * statistics.median(again),
        "start_dirty_mib": after.dirty - before.dirty,
    }


def host() -> None:
    """A process that is watched: 300 MiB, at rest, training, or training in phases, as its standard input says."""
    import numpy as np

    import memtrack
    from tests.benchmarks.training_loop import Training

    training = Training(np, lambda loss, step: None, memtrack.step)
    monitor = memtrack.start()
    monitor.wait_ready()
    print(monitor.path, flush=True)
    for line in sys.stdin:
        how, seconds = line.split()
        deadline = time.monotonic() + float(seconds)
        if how == "phases":
            while time.monotonic() < deadline:
                with memtrack.phase("forward"):
                    training.step()
        elif how == "busy":
            training.step_until(deadline)
        else:
            time.sleep(float(seconds))
        print("done", flush=True)
    monitor.stop()


if __name__ == "__main__":
    if sys.argv[1] == "host":
        host()
    else:
        print(json.dumps({"calls": calls, "idle": idle, "import": importing, "start": start}[sys.argv[1]]()))
