"""User code that must type-check: mypy reads it with everything else, nothing runs it."""

import memtrack
from memtrack.errors import MemtrackError
from memtrack.sinks import Batch, RunFigures


class PrintingSink:
    """A sink of one's own needs no base class."""

    @property
    def key(self) -> str:
        return "print:here"

    def write(self, batch: Batch) -> None:
        for point in batch.points():
            print(point.name, point.value, point.timestamp_ms)

    def finish(self, figures: RunFigures) -> None:
        print(figures.peak_rss_mib)

    def close(self) -> None:
        pass


@memtrack.phase("load")
def load(count: int) -> list[int]:
    return list(range(count))


def train() -> float | None:
    monitor: memtrack.Monitor = memtrack.autolog(trackers=["mlflow"], interval="500ms", metrics="all")
    monitor.stop()
    with memtrack.start(sinks=["jsonl", PrintingSink()], interval=1.0, recording_size="8MiB") as monitor:
        for number in load(10):
            memtrack.step(number)
            memtrack.epoch(number)
        memtrack.mark("done", 1.0)
        memtrack.gauge("memory/cache/used_mib", 2.0)
        attached = monitor.attach(PrintingSink())
        done: bool = attached.detach(timeout_s=1.0) and monitor.flush()
    print(done, monitor.path, str(monitor.summary()))
    return monitor.summary().figures.headroom_min_pct


def read(path: str) -> int:
    try:
        with memtrack.open_recording(path) as recording:
            return len(recording.to_numpy()["memory/process/rss_mib"])
    except MemtrackError:
        return 0
