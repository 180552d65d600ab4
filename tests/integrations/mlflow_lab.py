"""Real MLflow stores and servers on loopback, training scripts in their own processes, a proxy that misbehaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memtrack import metrics
from memtrack.recording.reader import RecordingReader

ROOT = Path(__file__).resolve().parents[2]

SUMMARY = "system/memory/summary/"

HEADER = """
import json, os, sys, threading, time
def report(**what):
    print("RESULT " + json.dumps(what), flush=True)
"""


def environment(**more):
    """The environment for a child: nothing of the caller's MLflow and memtrack settings, telemetry off, no proxy, and
    every window sent, so that windows can be counted."""
    drop = re.compile(r"(MLFLOW|MEMTRACK)_|.*_proxy$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not drop.match(name)}
    paths = [str(ROOT), str(ROOT / "integrations"), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        "MEMTRACK_SELECTIVE": "0",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "1",
        "GIT_PYTHON_REFRESH": "quiet",
        **more,
    }


# -- what MLflow has --------------------------------------------------------------------------------------------------


class Store:
    """What an MLflow tracking URI holds, read through MLflow's own client."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def client(self):
        """A client of MLflow's."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def runs(self, experiment=None):
        """All runs, oldest first; of one experiment by name if it is given."""
        found = self.client().search_experiments()
        ids = [one.experiment_id for one in found if experiment is None or one.name == experiment]
        return sorted(self.client().search_runs(ids), key=lambda run: run.info.start_time)

    def history(self, run_id):
        """``key -> [(timestamp in ms, step, value)]`` in the order of time."""
        client = self.client()
        keys = client.get_run(run_id).data.metrics
        return {
            key: sorted((m.timestamp, m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys
        }

    def series(self, run_id):
        """``name -> [(timestamp in ms, step, value)]`` of memtrack's charts, without the final figures."""
        return {
            key.removeprefix("system/"): points
            for key, points in self.history(run_id).items()
            if key.startswith("system/memory/") and not key.startswith(SUMMARY)
        }


_shared: dict[str, Any] = {}
"""The template and the server. Several folders of tests have these fixtures, and pytest makes one for each."""


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory):
    """A migrated, empty database of MLflow, made once: the migrations take seconds."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the full mlflow, with its SQL store")
    if "template" in _shared:
        return _shared["template"]
    path = _shared["template"] = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    subprocess.run(
        [sys.executable, "-c", f"import mlflow; mlflow.MlflowClient('sqlite:///{path}').search_experiments()"],
        cwd=path.parent,
        env=environment(),
        check=True,
        capture_output=True,
        timeout=200,
    )
    return path


@contextmanager
def sqlite_copy(template, folder):
    """A store of its own for a test: a copy of the template."""
    path = folder / "mlflow.db"
    shutil.copy(template, path)
    yield Store(f"sqlite:///{path}")
    from mlflow.tracking._tracking_service.utils import _get_store

    _get_store(f"sqlite:///{path}").engine.dispose()


@pytest.fixture
def sqlite_store(mlflow_template, tmp_path):
    """An empty SQLite store, written to by the training process itself."""
    with sqlite_copy(mlflow_template, tmp_path) as store:
        yield store


class Server(Store):
    """``mlflow server`` on loopback, on one port for its whole life.

    ``options`` are added to its command line, and ``variables`` to its environment. With a ``context``, which trusts
    its certificate, it is asked over TLS; ``prefix`` is the path that it is under.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        prefix: str = "",
        context: ssl.SSLContext | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        super().__init__(f"http{'s' if context else ''}://127.0.0.1:{self.port}{prefix}")
        self._folder = folder
        self._options = options
        self._variables = variables or {}
        self._context = context
        self._process: subprocess.Popen[bytes] | None = None

    def start(self):
        """Start it if it does not run, and wait until it is healthy."""
        if self._process is not None:
            return
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"),
            *(self._options or ("--default-artifact-root", f"file://{self._folder}/artifacts")),
        ]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment(**self._variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.healthy():
                return
            time.sleep(0.1)
        log_end = (self._folder / "server.log").read_text()[-2000:]
        self.stop()
        raise RuntimeError(f"mlflow server did not start:\n{log_end}")

    def healthy(self):
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5, context=self._context) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self):
        """Kill it with all its processes, as a crash or a node that is taken away would."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None


@pytest.fixture(scope="session")
def _server(mlflow_template, tmp_path_factory):
    if "server" not in _shared:
        folder = tmp_path_factory.mktemp("mlflow-server")
        shutil.copy(mlflow_template, folder / "mlflow.db")
        _shared["server"] = Server(folder)
    yield _shared["server"]
    _shared["server"].stop()


@pytest.fixture
def mlflow_server(_server):
    """A real ``mlflow server``, running; a test may ``stop()`` it and ``start()`` it again on the same port."""
    _server.start()
    return _server


# -- a proxy that misbehaves --------------------------------------------------------------------------------------


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that was killed in the middle is nothing to print."""


class Proxy(Store):
    """An HTTP proxy in front of a server, with TLS if it is given a ``context`` for that.

    It has the server under the path ``prefix``, and beside it the documents of ``site``, path -> what becomes JSON.
    ``misbehave`` decides what becomes of each of memtrack's requests.

    It is called with the number of the request and returns None to pass it on, or one of: ``("wait", seconds)`` and
    then pass it on, ``("answer", status, headers)`` in the server's stead, ``("hang up",)`` after the server has
    taken it. The requests of the user's own code are passed on.
    """

    def __init__(
        self,
        server: Server,
        *,
        context: ssl.SSLContext | None = None,
        prefix: str = "",
        site: dict[str, Any] | None = None,
    ) -> None:
        self.misbehave: Callable[[int], tuple[Any, ...] | None] = lambda number: None
        self.requests: list[float] = []
        """When each of memtrack's requests came, monotonic."""
        self.gate: Callable[[Any], int | None] = lambda headers: None
        """Told of the headers of each request, whoever sent it; a status is the answer in the server's stead."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.forward(b"")

            def do_POST(self):
                self.forward(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST

            def forward(self, body):
                what = None
                refused = proxy.gate(self.headers)
                if refused is not None:
                    return self.answer(refused, {}, b"")
                if site and self.path in site:
                    return self.answer(200, {"Content-Type": "application/json"}, json.dumps(site[self.path]).encode())
                if not self.path.startswith(prefix):
                    return self.answer(404, {}, b"")
                if self.path.endswith("/log-batch") and b"memory/" in body:
                    proxy.requests.append(time.monotonic())
                    what = proxy.misbehave(len(proxy.requests))
                if what is not None and what[0] == "wait":
                    time.sleep(what[1])
                if what is not None and what[0] == "answer":
                    return self.answer(what[1], what[2], b"")
                upstream = HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "host")}
                    upstream.request(self.command, self.path.removeprefix(prefix), body or None, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                except (OSError, HTTPException):
                    return self.answer(502, {}, b"")
                finally:
                    upstream.close()
                if what is not None and what[0] == "hang up":
                    self.close_connection = True
                    return None
                return self.answer(answer.status, {"Content-Type": answer.getheader("Content-Type")}, content)

            def answer(self, status, headers, content):
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": len(content)}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the client has gone

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        if context is not None:
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        super().__init__(f"http{'s' if context else ''}://127.0.0.1:{self._http.server_address[1]}{prefix}")

    def close(self):
        """Stop it."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def proxy(mlflow_server):
    """A proxy in front of the real server; its ``uri`` is the tracking URI to use."""
    proxy = Proxy(mlflow_server)
    yield proxy
    proxy.close()


# -- training scripts -----------------------------------------------------------------------------------------------


@dataclass
class Training:
    """What a training script in a process of its own came to."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    recordings: list[Path] = field(default_factory=list)

    @property
    def result(self):
        """What the script gave to ``report()``; of several calls, all together."""
        lines = [line[7:] for line in self.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, f"no result; stderr:\n{self.stderr}"
        return {key: value for line in lines for key, value in json.loads(line).items()}

    @property
    def recording(self):
        """The one recording that it left."""
        assert len(self.recordings) == 1, self.recordings
        return self.recordings[0]


class Script:
    """A training script that runs in a child process."""

    def __init__(self, path, env, folder):
        self.folder = path.parent
        """Its working directory."""
        self._folder = folder
        self._known = set(folder.glob("*.mtk"))
        self._started = time.monotonic()
        # files, not pipes: a script must not wait for this process to read
        self._out, self._err = path.with_suffix(".out"), path.with_suffix(".err")
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(path)],
                cwd=path.parent,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def wait_for(self, word, timeout=200):
        """Wait until the script has printed a line that begins with ``word``; the rest of that line."""
        deadline = time.monotonic() + timeout
        ended = False
        while not ended and time.monotonic() < deadline:
            ended = self.process.poll() is not None
            for line in self._out.read_text().splitlines(keepends=True):
                if line.startswith(word) and line.endswith("\n"):
                    return line[len(word) :].strip()
            time.sleep(0.02)
        raise AssertionError(f"the script did not print {word!r}; stderr:\n{self._err.read_text()}")

    def finish(self, timeout=200, check=True):
        """Wait for the script's end."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the script did not end in {timeout} s; stderr:\n{self._err.read_text()}") from None
        seconds = time.monotonic() - self._started
        found = sorted(set(self._folder.glob("*.mtk")) - self._known)
        training = Training(self.process.returncode, self._out.read_text(), self._err.read_text(), seconds, found)
        if check:
            assert training.returncode == 0, training.stderr
        return training


@contextmanager
def scripts(tmp_path):
    """What the fixture ``train`` gives, with the scripts and recordings in a folder."""
    folder = tmp_path / "recordings"
    folder.mkdir(mode=0o700)
    started: list[Script] = []

    def run(source, store=None, *, wait=True, check=True, timeout=200, **env):
        path = tmp_path / f"train{len(started)}.py"
        path.write_text(HEADER + source)
        uri = {} if store is None else {"MLFLOW_TRACKING_URI": store.uri}
        script = Script(path, environment(MEMTRACK_DIR=str(folder), **uri, **env), folder)
        started.append(script)
        return script.finish(timeout, check) if wait else script

    yield run
    for script in started:
        if script.process.poll() is None:
            script.process.kill()
            script.process.wait()


@pytest.fixture
def train(tmp_path):
    """``train(source, store, **environment)`` runs a script and returns a :class:`Training`; ``wait=False`` a
    :class:`Script`.

    The script can ``report(key=value)``. ``store`` may be None: no tracking URI is set then.
    """
    with scripts(tmp_path) as run:
        yield run


# -- comparing a run with the recording -----------------------------------------------------------------------------


def rows(recording, since=0.0, until=float("inf")):
    """The windows of a recording whose middle lies between two times, in seconds of Unix time."""
    with RecordingReader(str(recording)) as reader:
        found = list(reader.windows())
    return [row for row in found if since <= (row.start_wall_ns + row.end_wall_ns) / 2e9 <= until]


def points(found):
    """``name -> [(timestamp in ms, value)]``: what the default charts of these windows must show."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in found:
        timestamp = round(row.end_wall_ns / 1e6)
        for name, cell in row.cells.items():
            if metrics.selected(name, "default"):
                expected.setdefault(name, []).append((timestamp, cell.mean))
                if metrics.has_peak(name):
                    expected.setdefault(metrics.peak_name(name), []).append((timestamp, cell.max))
    return expected


def check_run(store, run_id, recording, since, until, *, slack_s=0.1, outer_s=0.3):
    """Assert that a run has every window of the recording between two times, and none from outside of them.

    Each point has the window's end as its time, the window's mean (or maximum) as its value, and whole seconds since
    the run's start as its step. Windows within ``slack_s`` inside of the two times, or ``outer_s`` outside of them, may
    be there or not: the script notes its times a little after the start and before the end. Returns the run's series.
    """
    series = store.series(run_id)
    start_ms = store.client().get_run(run_id).info.start_time
    must = points(rows(recording, since + slack_s, until - slack_s))
    may = points(rows(recording, since - outer_s, until + outer_s))
    assert must, "no windows in that time"
    assert set(must) <= set(series) <= set(may)
    for name, found in series.items():
        got = [(timestamp, value) for timestamp, _, value in found]
        assert len(set(got)) == len(got), f"{name} has points twice"
        assert not set(must.get(name, ())) - set(got), f"{name} lacks windows"
        assert not set(got) - set(may[name]), f"{name} has points of no window of this run"
        assert all(step == (timestamp - start_ms) // 1000 for timestamp, step, _ in found)
    return series
