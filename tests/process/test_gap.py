"""Samples go on while the training process holds the GIL: that is when memory moves."""

from __future__ import annotations

import itertools
import time

from memtrack.recording.reader import RecordingReader

GAP_S = 0.3


def test_no_gap_while_the_gil_is_held(run_child):
    """During one sorted() of some three seconds, no two samples are further apart than 0.3 s."""
    child = run_child("""
import random, time, memtrack
monitor = memtrack.start(interval=1)
monitor.wait_ready()
print(monitor.path, flush=True)
rng = random.Random(1)
size = 500_000
values = [rng.random() for _ in range(size)]
began = time.perf_counter()
sorted(values)
took = time.perf_counter() - began
# as many values as will take about three seconds here
values = [rng.random() for _ in range(min(int(size * 3.0 / took), 8_000_000))]
print("begin", flush=True)
began = time.monotonic_ns()
sorted(values)
print(began, time.monotonic_ns(), flush=True)
sys.stdin.readline()
""")
    path = child.stdout.readline().strip()
    assert child.stdout.readline() == "begin\n"
    seen = []
    with RecordingReader(path) as reader:
        import select

        while not select.select([child.stdout], [], [], 0.001)[0]:
            sampled_ns = reader.pulse().mono_ns
            if not seen or sampled_ns != seen[-1]:
                seen.append(sampled_ns)
        began, ended = map(int, child.stdout.readline().split())
        time.sleep(0.3)
        seen.append(reader.pulse().mono_ns)
    assert ended - began > 1.5e9, "the sort was too short to show anything"
    inside = [at for at in seen if began - GAP_S * 1e9 <= at <= ended + GAP_S * 1e9]
    gaps = [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(inside)]
    assert len(gaps) > 5
    assert max(gaps) <= GAP_S, sorted(gaps)[-5:]
