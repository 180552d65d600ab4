"""A recording as numpy arrays and as a pandas table: what was the peak of each second, and where did it stand?"""

import sys
import time

import memtrack


def record():
    with memtrack.start(interval="100ms") as monitor, memtrack.phase("train"):
        for step in range(20):
            memtrack.step(step)
            block = bytearray((step + 1) << 22)
            time.sleep(0.05)
            del block
    return monitor.path


def main(path):
    recording = memtrack.open_recording(path)
    rss = recording.to_numpy()["memory/process/rss_mib"]
    highest = rss[rss["max"].argmax()]
    print(f"{len(rss)} windows, peak {highest['max']:.0f} MiB at step {highest['step']}")
    table = recording.to_pandas()
    print(table.groupby("metric", observed=True)["max"].max().to_string())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else record())
