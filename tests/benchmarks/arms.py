"""The arms of the overhead benchmark: the tracking store, and one run of the training loop seen from outside."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

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

HERE = Path(__file__).resolve().parent
SEEN_SHARE = 0.8
PEAK_SERIES = "system/memory/process/rss_peak_mib"
MLFLOW_SERIES = "system/system_memory_usage_megabytes"
Figures = dict[str, float]


class Store:
    """Where runs go: an MLflow server on this machine, or the database file itself."""

    def __init__(self, kind: str, folder: Path, environ: dict[str, str]) -> None:
        self._database = folder / "mlflow.db"
        self._server: subprocess.Popen[bytes] | None = None
        self.uri = f"sqlite:///{self._database}"
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", self.uri]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kind == "server":
            self._serve(folder, environ)

    def _serve(self, folder: Path, environ: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.uri, "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1", "--default-artifact-root", str(folder / "artifacts"),
        ]  # fmt: skip
        with open(folder / "server.log", "wb") as log:
            self._server = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        self.uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline or self._server.poll() is not None:
                    self.close()
                    raise SystemExit((folder / "server.log").read_text()) from None
                time.sleep(0.2)

    def cpu(self) -> float:
        """Seconds on a processor that the server has taken so far."""
        return 0.0 if self._server is None else sum(map(cpu, [self._server.pid, *descendants(self._server.pid)]))

    def points(self, run_id: str) -> dict[str, list[tuple[float, float]]]:
        """For each series of a run the points that have arrived: Unix time in seconds, and value."""
        found: dict[str, list[tuple[float, float]]] = {}
        with sqlite3.connect(f"file:{self._database}?mode=ro", uri=True) as connection:
            query = "select key, timestamp, value from metrics where run_uuid = ? order by timestamp"
            for key, timestamp_ms, value in connection.execute(query, (run_id,)):
                found.setdefault(key, []).append((timestamp_ms / 1000, value))
        connection.close()
        return found

    def close(self) -> None:
        """Stop the server."""
        if self._server is not None and self._server.poll() is None:
            os.killpg(self._server.pid, signal.SIGTERM)
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._server.pid, signal.SIGKILL)


class Loop:
    """One run of the training loop, and what it looked like from outside."""

    def __init__(self, arm: str, store: Store, quick: bool, environ: dict[str, str]) -> None:
        self._store = store
        self._spikes: list[dict[str, float]] = []
        self._gaps: list[float] = []
        self.figures: Figures = {}
        command = [sys.executable, str(HERE / "training_loop.py"), arm, "--tracking-uri", store.uri]
        self._arm = arm
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when the loop has ended
        self._child = subprocess.Popen(
            command + ["--quick"] * quick, env=environ, text=True,
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

    def _cpu(self) -> tuple[float, float, float]:
        threads = cpu_by_thread(self._child.pid)
        main = threads.pop(self._child.pid, 0.0)
        return main, sum(threads.values()), cpu(self._agent) if self._agent else 0.0

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
        seconds = (said["mono_ns"] - self._train[0]) / 1e9
        now = (*self._cpu(), self._store.cpu())
        main, others, of_agent, server = (after - before for after, before in zip(now, self._train[1:], strict=True))
        figures["main_cpu_pct"] = 100 * main / seconds
        figures["threads_cpu_pct"] = 100 * others / seconds
        figures["agent_cpu_pct"] = 100 * of_agent / seconds
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
        self.figures["end_s"] = said["end_s"]

    # -- what arrived ---------------------------------------------------------------------------------------------

    def _judge_points(self, points: dict[str, list[tuple[float, float]]]) -> None:
        series = {key: found for key, found in points.items() if key.startswith("system/")}
        self.figures["series"] = len(series)
        if not series:
            return
        self.figures["points"] = statistics.median(len(found) for found in series.values())
        if self._arm == "memtrack":
            seen = [self._seen(spike, series[PEAK_SERIES], 1.0, window_s=1.2) for spike in self._spikes]
        else:
            found = series[MLFLOW_SERIES]
            times = [self._gil_began_s, *(at for at, _ in found)]
            self.figures["gap_ms"] = 1000 * max(
                later - earlier
                for earlier, later in pairwise(sorted(times))
                if later > self._gil_began_s and earlier < self._gil_ended_s
            )
            # MLflow's is the machine's memory, in units of 10**6 bytes; the points around tell what it was before
            spikes = [{**spike, "base_mib": self._usual(spike, found) * 1e6 / MIB} for spike in self._spikes]
            seen = [self._seen(spike, found, 1e6 / MIB, window_s=0.3) for spike in spikes]
        self.figures["first_spike"] = 100.0 * seen[0]
        self.figures["spikes_pct"] = 100.0 * sum(seen) / len(seen)
        self.figures["spike_ms"] = 1000 * statistics.median(each["end_s"] - each["begin_s"] for each in self._spikes)

    @staticmethod
    def _usual(spike: dict[str, float], points: list[tuple[float, float]]) -> float:
        """The median of the points within three seconds of a spike but not in it."""
        near = [
            value
            for at, value in points
            if spike["begin_s"] - 3.0 < at < spike["begin_s"] or spike["end_s"] + 0.3 < at < spike["end_s"] + 3.0
        ]
        return statistics.median(near) if near else math.inf

    @staticmethod
    def _seen(spike: dict[str, float], points: list[tuple[float, float]], unit_mib: float, window_s: float) -> bool:
        enough_mib = spike["base_mib"] + SEEN_SHARE * spike["height_mib"]
        return any(
            spike["begin_s"] <= at <= spike["end_s"] + window_s and value * unit_mib >= enough_mib
            for at, value in points
        )
