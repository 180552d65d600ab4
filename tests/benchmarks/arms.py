"""The arms of the overhead benchmark: one run of the training loop, seen from outside."""

from __future__ import annotations

import json
import math
import select
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrack.recording.reader import RecordingReader
from tests.benchmarks.readings import (
    MIB,
    Memory,
    cpu,
    cpu_by_thread,
    cpu_of_dead,
    descendants,
    memory,
    written_bytes,
)

if TYPE_CHECKING:
    from tests.benchmarks.stores import Points, Store

HERE = Path(__file__).resolve().parent
SEEN_SHARE = 0.8
Figures = dict[str, float]


class Loop:
    """One run of the training loop, and what it looked like from outside."""

    def __init__(self, tracker: str, arm: str, store: Store, quick: bool, environ: dict[str, str]) -> None:
        self._store = store
        self._spikes: list[dict[str, float]] = []
        self._gaps: list[float] = []
        self.figures: Figures = {}
        command = [sys.executable, str(HERE / "training_loop.py"), tracker, arm, store.address]
        self._arm = arm
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the loop has ended
        self._child = subprocess.Popen(
            command + ["--quick"] * quick, env=environ | store.environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._reader: RecordingReader | None = None
        self._agent = 0
        self._started: dict[str, Any] = {}

    def run(self) -> Figures:
        """The figures of the run. SystemExit if the loop failed."""
        assert self._child.stdout is not None
        try:
            for line in self._child.stdout:
                said = json.loads(line)
                getattr(self, f"_on_{said.pop('event')}")(said)
            status = self._child.wait()
        except BaseException:
            self._child.kill()
            raise
        if status:
            self._errors.seek(0)
            raise SystemExit(f"the loop of arm {self._arm} failed:\n{self._errors.read()}")
        self._errors.close()
        self.figures["exit_s"] = (time.monotonic_ns() - self._ended_ns) / 1e9
        self.figures["stop_s"] = self.figures.pop("end_s") + self.figures["exit_s"]
        self._judge_points(self._store.points(self._started["run_id"]))
        if self._reader is not None:
            self._reader.close()
        return self.figures

    def _on_started(self, said: dict[str, Any]) -> None:
        self._started = said
        self.figures["start_ms"] = 1000 * said["start_s"]
        self.figures["call_ms"] = 1000 * said["call_s"]
        if said["recording"]:
            self._reader = RecordingReader(said["recording"])

    def _on_train_begin(self, said: dict[str, Any]) -> None:
        if self._reader is not None:
            self._agent = self._reader.head().agent_pid
            self.figures["agent_start_cpu_ms"] = 1000 * cpu(self._agent)
        self._train = (said["mono_ns"], *self._cpu(), self._store.cpu())

    def _on_train_end(self, said: dict[str, Any]) -> None:
        self.figures["train_s"] = (said["mono_ns"] - self._train[0]) / 1e9

    def _cpu(self) -> tuple[float, float, float, float]:
        """Of the main thread, the other threads, the agent, and the tracker's own processes."""
        threads = cpu_by_thread(self._child.pid)
        main = threads.pop(self._child.pid, 0.0)
        of_tracker = sum(map(cpu, descendants(self._child.pid)))
        return main, sum(threads.values()), cpu(self._agent) if self._agent else 0.0, of_tracker

    def _on_spike(self, said: dict[str, Any]) -> None:
        self._spikes.append(said)

    def _on_gil_begin(self, said: dict[str, Any]) -> None:
        self._gil_began_s = said["wall_s"]
        if self._reader is None:
            return
        assert self._child.stdout is not None
        samples = [said["mono_ns"]]
        while not select.select([self._child.stdout], [], [], 0.005)[0]:
            newest = self._reader.pulse().mono_ns
            if newest > samples[-1]:
                samples.append(newest)
        self._gaps = [(later - earlier) / 1e6 for earlier, later in pairwise(samples)]

    def _on_gil_end(self, said: dict[str, Any]) -> None:
        self._gil_ended_s = said["wall_s"]
        self.figures["gil_s"] = self._gil_ended_s - self._gil_began_s
        if self._gaps:
            self.figures["gap_ms"] = max(self._gaps)

    def _on_measure(self, said: dict[str, Any]) -> None:
        pid, agent, figures = self._child.pid, self._agent, self.figures
        self._measured_s = said["wall_s"]
        seconds = (said["mono_ns"] - self._train[0]) / 1e9
        now = (*self._cpu(), self._store.cpu())
        main, others, of_agent, of_tracker, server = (
            after - before for after, before in zip(now, self._train[1:], strict=True)
        )
        figures["main_cpu_pct"] = 100 * main / seconds
        figures["threads_cpu_pct"] = 100 * others / seconds
        figures["agent_cpu_pct"] = 100 * of_agent / seconds
        figures["tracker_cpu_pct"] = 100 * of_tracker / seconds
        figures["server_cpu_pct"] = 100 * server / seconds
        figures["threads"] = len(cpu_by_thread(pid))
        figures["children_cpu_ms"] = 1000 * cpu_of_dead(pid)
        passed, disk = written_bytes(pid)
        figures["written_mib"], figures["disk_mib"] = passed / MIB, disk / MIB
        if agent:
            passed, disk = written_bytes(agent)
            figures["agent_written_mib"], figures["agent_disk_mib"] = passed / MIB, disk / MIB
        looks = []
        for _ in range(3):
            own = memory(pid)
            of_tree = sum((memory(each) for each in descendants(pid)), own)
            looks.append((own, of_tree, memory(agent) if agent else Memory()))
            time.sleep(0.3)
        own, of_tree, of_agent_memory = sorted(looks)[1]
        figures["uss_mib"], figures["pss_mib"], figures["dirty_mib"] = own.uss, own.pss, own.dirty
        figures["tracker_pss_mib"] = of_tree.pss - own.pss
        figures["tree_pss_mib"] = of_tree.pss + of_agent_memory.pss
        figures["tree_uss_mib"] = of_tree.uss + of_agent_memory.uss
        if agent:
            figures["agent_rss_mib"], figures["agent_pss_mib"] = of_agent_memory.rss, of_agent_memory.pss
            figures["agent_uss_mib"] = of_agent_memory.uss
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def _on_ended(self, said: dict[str, Any]) -> None:
        self._ended_ns = said["mono_ns"]
        self._minutes = (said["wall_s"] - self._started["wall_s"]) / 60
        self.figures["end_s"] = said["end_s"]

    # -- what arrived ---------------------------------------------------------------------------------------------

    def _judge_points(self, series: Points) -> None:
        self.figures["series"] = len(series)
        if not series:
            return
        counts = [len(found) for found in series.values()]
        self.figures["points_per_min"] = statistics.median(counts) / self._minutes
        self.figures["most_points_per_min"] = max(counts) / self._minutes
        if self._arm == "memtrack":
            found = series[self._store.peak_key]
            seen = [self._seen(spike, found, 1.0, window_s=1.2) for spike in self._spikes]
        else:
            key, unit_mib, is_machine = self._store.own
            found = series[key]
            # whoever samples seldom may have taken none since
            times = [self._gil_began_s, *(at for at, _ in found), self._measured_s]
            self.figures["gap_ms"] = 1000 * max(
                later - earlier
                for earlier, later in pairwise(sorted(times))
                if later > self._gil_began_s and earlier < self._gil_ended_s
            )
            spikes = self._spikes
            if is_machine:  # the points around tell what it was before
                spikes = [{**spike, "base_mib": unit_mib * self._usual(spike, found)} for spike in spikes]
            seen = [self._seen(spike, found, unit_mib, window_s=0.3) for spike in spikes]
        self.figures["first_spike"] = 100.0 * seen[0]
        self.figures["spikes_pct"] = 100.0 * sum(seen) / len(seen)
        self.figures["spike_ms"] = 1000 * statistics.median(each["end_s"] - each["begin_s"] for each in self._spikes)

    @staticmethod
    def _usual(spike: dict[str, float], points: list[tuple[float, float]]) -> float:
        """The median of the points near a spike but not in it, within three seconds if there are any."""
        for near_s in (3.0, 15.0):
            since_s, until_s = spike["begin_s"] - near_s, spike["end_s"] + near_s
            near = [
                value for at, value in points if since_s < at < spike["begin_s"] or spike["end_s"] + 0.3 < at < until_s
            ]
            if near:
                return statistics.median(near)
        return math.inf

    @staticmethod
    def _seen(spike: dict[str, float], points: list[tuple[float, float]], unit_mib: float, window_s: float) -> bool:
        enough_mib = spike["base_mib"] + SEEN_SHARE * spike["height_mib"]
        return any(
            spike["begin_s"] <= at <= spike["end_s"] + window_s and value * unit_mib >= enough_mib
            for at, value in points
        )
