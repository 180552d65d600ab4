"""Where the runs of the overhead benchmark go, one kind for each tracker, and what arrived there."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, NamedTuple

from tests.benchmarks.readings import MIB, cpu, descendants

if TYPE_CHECKING:
    from pathlib import Path

Points = dict[str, list[tuple[float, float]]]
"""For each series of a run its points: Unix time in seconds, and value."""


class OwnMemory(NamedTuple):
    """The series of the tracker's own metrics in which a spike must show."""

    key: str
    unit_mib: float
    is_machine: bool
    """Whether it is the memory of the whole machine, and not of the training process."""


class MlflowStore:
    """An MLflow server on this machine, or the database file itself."""

    peak_key = "system/memory/process/rss_peak_mib"
    own = OwnMemory("system/system_memory_usage_megabytes", 1e6 / MIB, True)
    artifacts_option = "--default-artifact-root"
    environ: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __init__(self, folder: Path, environ: dict[str, str], kind: str) -> None:
        self._database = folder / "mlflow.db"
        self._server: subprocess.Popen[bytes] | None = None
        self.address = f"sqlite:///{self._database}"
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", self.address]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kind == "server":
            self._serve(folder, environ)

    def _serve(self, folder: Path, environ: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.address, "--host", "127.0.0.1",
            "--port", str(port), "--workers", "1", self.artifacts_option, str(folder / "artifacts"),
        ]  # fmt: skip
        with open(folder / "server.log", "wb") as log:
            self._server = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        self.address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline or self._server.poll() is not None:
                    self.close()
                    raise SystemExit((folder / "server.log").read_text()) from None
                time.sleep(0.2)

    def cpu(self) -> float:
        """Seconds on a processor that the server has taken so far."""
        return 0.0 if self._server is None else sum(map(cpu, [self._server.pid, *descendants(self._server.pid)]))

    def points(self, run_id: str) -> Points:
        """The system metrics of a run that have arrived; final figures are none."""
        found: Points = {}
        with sqlite3.connect(f"file:{self._database}?mode=ro", uri=True) as connection:
            query = "select key, timestamp, value from metrics where run_uuid = ? order by timestamp"
            for key, timestamp_ms, value in connection.execute(query, (run_id,)):
                if key.startswith("system/") and not key.startswith("system/memory/summary/"):
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


class WandbStore:
    """A folder of offline runs, written by W&B's own process and read by W&B's own reader."""

    peak_key = "proc.memory.rssMB/l:peak"
    own = OwnMemory("proc.memory.rssMB", 1.0, False)
    environ = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}  # noqa: RUF012 - never changed

    def __init__(self, folder: Path, environ: dict[str, str], kind: str) -> None:
        self.address = str(folder)

    def cpu(self) -> float:
        """There is no server."""
        return 0.0

    def points(self, run_id: str) -> Points:
        """The system metrics of a run."""
        from tests.integrations.wandb_lab import milliseconds, read_run

        found: Points = {}
        for record in read_run(self.address, run_id).of("stats"):
            at = milliseconds(record["timestamp"]) / 1000
            for key, value in record["item"].items():
                found.setdefault(key, []).append((at, value))
        return {key: sorted(series) for key, series in found.items()}

    def close(self) -> None:
        """W&B's process ends with the training process."""


class CometStore:
    """A folder of archives of offline experiments."""

    peak_key = "sys.memory.process.rss_peak_mib"
    own = OwnMemory("sys.ram.used", 1 / MIB, True)
    environ = {  # noqa: RUF012 - never changed
        "COMET_LOGGING_CONSOLE": "ERROR",
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "COMET_ERROR_TRACKING_ENABLE": "false",
        **{f"COMET_SYSTEM_{what}_INTERVAL": "10" for what in ("CPU", "GPU", "NETWORK", "DISK")},
    }

    def __init__(self, folder: Path, environ: dict[str, str], kind: str) -> None:
        self._folder = folder / "comet"
        self.address = str(self._folder)

    def cpu(self) -> float:
        """There is no server."""
        return 0.0

    def points(self, run_id: str) -> Points:
        """The system metrics of an experiment."""
        from tests.integrations.comet_lab import read_archive

        (path,) = self._folder.glob(f"{run_id}*.zip")
        found: Points = {}
        for name, value, _, _, timestamp_ms in read_archive(path).metrics:
            if name.startswith("sys."):
                found.setdefault(name, []).append((timestamp_ms / 1000, value))
        return {name: sorted(series) for name, series in found.items()}

    def close(self) -> None:
        """Nothing runs."""


Store = MlflowStore | WandbStore | CometStore
STORES: dict[str, type[MlflowStore] | type[WandbStore] | type[CometStore]] = {
    "mlflow": MlflowStore,
    "wandb": WandbStore,
    "comet": CometStore,
}
