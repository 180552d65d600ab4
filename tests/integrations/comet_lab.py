"""Real Comet experiments without a network: training scripts, archives read back, and a backend on loopback."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.integrations.mlflow_lab import environment, points, rows, scripts

QUIET = {
    "COMET_LOGGING_CONSOLE": "ERROR",
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_ERROR_TRACKING_ENABLE": "false",
    "COMET_AUTO_LOG_CODE": "0",
    "COMET_AUTO_LOG_ENV_DETAILS": "0",
    "COMET_AUTO_LOG_OUTPUT_LOGGER": "0",
}
"""Comet without what it logs by itself, which takes time and says nothing here."""

API_KEY = "s3cretS3cretS3cretS3cret1"

SLACK_S = 0.15
"""A window and a half: one that ends in the middle of the other things of its time may be there or not."""

FAST = "interval=0.1, flush_interval=0.1"


def series_name(name):
    """memtrack's name for a metric of memtrack's in Comet."""
    return "/".join(name.removeprefix("sys.").split(".", 2))


class Log:
    """What was logged to an experiment: a list of Comet's messages, read in order."""

    def __init__(self, messages) -> None:
        self.messages = list(messages)
        self.experiment: dict[str, Any] = {}

    @property
    def others(self):
        """``name -> value`` of what stands under Other."""
        return {m["payload"]["key"]: m["payload"]["value"] for m in self.messages if m["type"] == "log_other"}

    @property
    def metrics(self):
        """``[(name, value, step, epoch, time in ms)]`` of all metrics."""
        found = [m["payload"] for m in self.messages if m["type"] == "metric_msg"]
        return [
            (m["metric"]["metricName"], m["metric"]["metricValue"], m["metric"]["step"], m["metric"]["epoch"], m[key])
            for m in found
            for key in ["local_timestamp"]
        ]

    @property
    def series(self):
        """``memtrack's name -> [(time in ms, value)]`` of memtrack's charts."""
        found: dict[str, list[tuple[int, float]]] = {}
        for name, value, step, epoch, stamp in self.metrics:
            if name.startswith("sys.memory."):
                assert step is None
                assert epoch is None
                found.setdefault(series_name(name), []).append((stamp, value))
        return found

    @property
    def users(self):
        """``[(name, value, step, epoch)]`` of the user's own metrics, and the steps that Comet has noted, in order."""
        logged = [m[:4] for m in self.metrics if not m[0].startswith("sys.") and m[0] != "process duration"]
        parameters = [m["payload"]["param"] for m in self.messages if m["type"] == "parameter_msg"]
        return logged, [(p["paramName"], p["paramValue"], p["step"]) for p in parameters]


def read_messages(folder):
    """What Comet has written of an experiment that is running."""
    return Log(json.loads(line) for line in (Path(folder) / "messages.json").read_bytes().splitlines())


def read_archive(path):
    """The archive of an offline experiment; each line and the description are what ``comet upload`` takes."""
    with zipfile.ZipFile(path) as archive:
        log = Log(json.loads(line) for line in archive.read("messages.json").splitlines())
        log.experiment = json.loads(archive.read("experiment.json"))
        files = {name: archive.read(name) for name in archive.namelist()}
        assert len(archive.namelist()) == len(files)
    uploads = {m["payload"]["file_path"] for m in log.messages if m["type"] == "file_upload"}
    assert {*uploads, "messages.json", "experiment.json"} <= set(files)
    # of an asset that it was given as data, Comet packs its temporary file as well
    spare = set(files) - uploads - {"messages.json", "experiment.json"}
    assert all(files[name] in [files[other] for other in uploads] for name in spare)
    validate("offline-experiment", log.experiment)
    for message in log.messages:
        kind = {"metric_msg": "metric-msg", "log_other": "log-other-msg"}.get(message["type"])
        if kind is not None:
            validate(f"offline-{kind}", message["payload"])
    return log


_validators: dict[str, Any] = {}


def validate(name, what):
    """Check something against the schema that Comet's uploader has for it."""
    if name not in _validators:
        (folder,) = find_spec("comet_ml").submodule_search_locations
        schema = json.loads((Path(folder) / "schemas" / f"{name}.schema.json").read_text())
        _validators[name] = import_module("jsonschema").Draft7Validator(schema)
    _validators[name].validate(what)


def comet_offline(*paths):
    """What ``comet offline`` reads of archives: ``(experiment key, section, name) -> [value]``, as texts."""
    done = subprocess.run(
        [Path(sys.executable).parent / "comet", "offline", "--csv", "--level", "detail", *map(str, paths)],
        env=environment(**QUIET),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Error in processing" not in done.stderr
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in csv.DictReader(io.StringIO(done.stdout)):
        if row["level"] == "detail":  # each archive has a header of its own
            found.setdefault((row["experiment"], row["section"], row["name"]), []).append(row["value"])
    return found


def check_series(series, recording, begin, since, until, end):
    """Assert that an experiment has every window of the recording between ``since`` and ``until``, and none from before
    ``begin`` or after ``end``, each once, at the time of the window's end. In Unix time, in seconds."""
    must = points(rows(recording, since + SLACK_S, until - SLACK_S))
    may = points(rows(recording, begin - SLACK_S, end + SLACK_S))
    assert must, "no windows in that time"
    assert set(must) <= set(series) <= set(may)
    for name, found in series.items():
        assert len(set(found)) == len(found), f"{name} has points twice"
        assert not set(must.get(name, ())) - set(found), f"{name} lacks windows"
        assert not set(found) - set(may[name]), f"{name} has points of no window of this experiment"


# -- training scripts -----------------------------------------------------------------------------------------------


@contextmanager
def comet_scripts(folder):
    """``train(source, **environment)`` runs a script in a process of its own, offline unless it says otherwise; see
    ``mlflow_lab.scripts``. Archives are in ``comet/`` beside it, Comet's temporary folders in ``tmp/``."""
    for name in ("comet", "tmp"):
        (folder / name).mkdir()
    settings = {
        **QUIET,
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
        "TMPDIR": str(folder / "tmp"),
    }
    with scripts(folder) as run:

        def train(source, **env):
            return run(source, **{**settings, **env})

        yield train


def wait_until(condition, timeout=30.0):
    """Wait until a condition holds; returns what it gives."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("that did not happen in time")


def is_complete(path):
    """Whether an archive has been made."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "experiment.json" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


# -- a backend ------------------------------------------------------------------------------------------------------


class Backend:
    """As much of Comet's backend as its client asks for: it says yes to everything and keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        """Path and body of each."""
        self.upload_status = 200
        """What it answers to an upload."""
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding"):
                    body = zlib.decompress(body, 47)
                url = urlsplit(self.path)
                try:
                    content = json.loads(body)
                except ValueError:
                    content = parse_qs(url.query)
                backend.requests.append((url.path, content))
                text = json.dumps(ANSWER).encode()
                try:
                    self.send_response(backend.upload_status if url.path.endswith("/upload") else 200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:
                    self.close_connection = True  # the client was killed

            do_GET = do_POST = do_PUT = answer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.settings = {
            "COMET_START_ONLINE": "1",
            "COMET_URL_OVERRIDE": f"http://127.0.0.1:{self._http.server_address[1]}/clientlib",
        }
        """Where the client finds it."""

    def close(self):
        """Stop it."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def bodies(self, path, experiment_key):
        """What was sent for an experiment to paths that end so."""
        found = [body for where, body in list(self.requests) if where.endswith(path)]
        return [body for body in found if body.get("experimentKey", body.get("experiment_key")) == experiment_key]

    def log(self, experiment_key):
        """What an experiment was sent, in the words of an archive."""
        messages: list[dict[str, Any]] = []
        for body in self.bodies("experiment/metric", experiment_key):
            for value in body["values"]:
                metric = {key: value[key] for key in ("metricName", "metricValue", "step", "epoch")}
                messages.append(
                    {"type": "metric_msg", "payload": {"metric": metric, "local_timestamp": value["timestamp"]}}
                )
        for body in self.bodies("experiment/log-other", experiment_key):
            messages.append({"type": "log_other", "payload": {"key": body["key"], "value": body["value"]}})
        return Log(messages)


ANSWER = {
    "runId": "run",
    "projectId": "project",
    "isGithubEnabled": False,
    "focusUrl": "http://127.0.0.1/",
    "lastOffset": 0,
    "featureToggles": {},
    "upload_file_size_limits": {},
    "experimentName": "name",
    "msg": "ok",
    "code": 200,
    "version": "3.4.100",
    "data": {},
    "is_alive_beat_duration_millis": 10000,
    "gpu_monitor_interval_millis": 10000,
    "cpu_monitor_interval_millis": 10000,
    "tags": [],
}
"""All that any request asks for."""
