"""The training loop that the overhead benchmark measures. Run by overhead.py, once an arm, in a process of its own.

    python training_loop.py TRACKER ARM ADDRESS [--quick]

It trains a small model with numpy on 300 MiB of data, logs its loss to a tracker once a second, and goes through four
stages, each of which it reports on its standard output, one JSON object a line:

``train``    a fixed number of steps, each of which fills and frees 40 MiB
``spikes``   the same, and at random moments, at least 2 s apart, some 300 MB are filled and freed after 50 ms. Each
             is 2 MiB lower than the one before, so the kernel's high-water mark tells of the first one only
``gil``      one call of ``sorted`` that holds the interpreter lock for some 3 s
``measure``  nothing: whoever runs the loop looks at the process, and answers with a line on standard input

Sizes are chosen so that all that the loop allocates comes from ``mmap`` and goes back at once: what differs between
two arms is then what the monitoring has left behind, not how the allocator happened to be fragmented.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

from tests.benchmarks.clients import CLIENTS

OUT = sys.stdout
ARMS = ("plain", "memtrack", "own")
MIB = 1 << 20
DATA_MIB = 300
STEP_MIB = 40
SPIKE_MIB = 286  # 300 MB
SPIKE_STEP_MIB = 2
SPIKE_S = 0.05
SORTED = 20_000_000


class Length:
    """How long each stage is."""

    def __init__(self, quick: bool) -> None:
        self.steps = 120 if quick else 600
        self.spikes = 2 if quick else 10
        self.sorted = SORTED // 3 if quick else SORTED


def say(event: str, **fields: object) -> None:
    """Tell whoever runs the loop, with the time by both clocks."""
    line = {"event": event, "wall_s": time.time(), "mono_ns": time.monotonic_ns(), **fields}
    print(json.dumps(line), file=OUT, flush=True)


def resident_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096 / MIB


class Training:
    """A model and its data: ``step`` takes some 15 ms of one core, and rests as long as it would wait for its data."""

    def __init__(self, np: Any, log: Any, mark: Any) -> None:
        self._np = np
        self._log = log
        self._mark = mark
        self._data = np.ones(DATA_MIB * MIB // 4, dtype=np.float32).reshape(-1, 1024)
        self._weights = np.full((1024, 64), 0.01, dtype=np.float32)
        self._logged = 0.0
        self.steps = 0

    def step(self) -> None:
        np = self._np
        self._mark(self.steps)
        rows = STEP_MIB * MIB // 4096
        first = (self.steps * 512) % (len(self._data) - rows)
        activations = self._data[first : first + rows] * 0.5
        loss = float(np.tanh(activations[::16] @ self._weights).mean())
        del activations
        now = time.monotonic()
        if now - self._logged >= 1.0:
            self._logged = now
            self._log(loss, self.steps)
        self.steps += 1
        time.sleep(0.015)

    def step_until(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            self.step()


def spikes(training: Training, np: Any, count: int) -> None:
    """Memory that comes and goes faster than any sampling interval that one can afford."""
    moments = random.Random(7)
    for number in range(count):
        training.step_until(time.monotonic() + 2.2 + moments.random())
        height_mib = SPIKE_MIB - SPIKE_STEP_MIB * number
        before_mib = resident_mib()
        began_s = time.time()
        spike = np.empty(height_mib * MIB, dtype=np.uint8)
        spike.fill(1)
        full_s = time.time()
        time.sleep(SPIKE_S)
        top_mib = resident_mib()
        del spike
        say(
            "spike",
            begin_s=began_s,
            full_s=full_s,
            end_s=time.time(),
            base_mib=before_mib,
            height_mib=top_mib - before_mib,
        )
    # the window of the last one ends
    training.step_until(time.monotonic() + 2.0)


def hold_lock(np: Any, count: int) -> None:
    """One call that keeps the interpreter lock, and makes no objects."""
    values = np.random.default_rng(7).random(10_000).astype(object)
    shuffled = values[np.random.default_rng(8).integers(0, len(values), count)].tolist()
    say("gil_begin")
    sorted(shuffled)
    say("gil_end")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tracker", choices=CLIENTS)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("address")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    length = Length(arguments.quick)
    sys.stdout = sys.stderr  # trackers print where the run can be seen

    import numpy as np

    client = CLIENTS[arguments.tracker](arguments.arm, arguments.address)
    recording = ""
    mark: Any = lambda number: None  # noqa: E731
    began = time.perf_counter()
    if arguments.arm == "memtrack":
        import memtrack

        recording = memtrack.autolog().path
        mark = memtrack.step
    called = time.perf_counter()
    run_id = client.start()
    started = time.perf_counter()
    say("started", run_id=run_id, recording=recording, call_s=called - began, start_s=started - began)

    training = Training(np, client.log, mark)
    # the first steps warm up the client, the allocator, and the agent
    training.step_until(time.monotonic() + 2.0)
    say("train_begin")
    for _ in range(length.steps):
        training.step()
    say("train_end")
    spikes(training, np, length.spikes)
    hold_lock(np, length.sorted)
    training.step_until(time.monotonic() + 2.0)
    say("measure")
    sys.stdin.readline()

    ending = time.perf_counter()
    client.end()
    say("ended", end_s=time.perf_counter() - ending)


if __name__ == "__main__":
    main()
