"""No key and no token in what memtrack writes, says, or starts processes with, wherever trackers take them from."""

from __future__ import annotations

import base64
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.integrations.mlflow_lab import ROOT, environment

pytest.importorskip("typer", reason="the verbs are tried, too")
pytest.importorskip("rich", reason="the verbs are tried, too")

PLACES = (
    "username", "password", "token", "uri_user", "uri_password", "wandb", "comet", "aws_id", "aws_secret",
    "aws_session", "netrc", "aws_file", "argument", "variable", "exception", "param", "azure",
)  # fmt: skip

PAIRS = (("basic", "username", "password"), ("uri", "uri_user", "uri_password"))

SCRIPT = """
import mlflow, memtrack
if len(sys.argv) == 1:
    secret = os.environ["ARGUMENT"]
    os.execv(sys.executable, [sys.executable, *sys.argv, "--api-key", secret, "key=" + secret])
memtrack.autolog(interval=0.1, flush_interval=FLUSH)
run = mlflow.start_run()
mlflow.log_param("key", os.environ["PARAM"])
with memtrack.phase("load"):
    block = bytearray(60 << 20)
    memtrack.step(3)
    time.sleep(1.5)
report(run_id=run.info.run_id, pid=os.getpid())
END
"""

ENDS = {
    # what is left then is the agent's to deliver
    "killed": (30.0, "time.sleep(60)"),
    "exception": (30.0, "raise RuntimeError('no access with key ' + os.environ['EXCEPTION'])"),
    "in order": (0.3, "mlflow.end_run()"),
}


class Cmdlines:
    """Collects the command lines of all processes of memtrack's that run meanwhile."""

    def __init__(self) -> None:
        self.seen: dict[int, bytes] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(0.01):
            for name in os.listdir("/proc"):
                if name.isdecimal():
                    try:
                        words = Path("/proc", name, "cmdline").read_bytes()
                    except OSError:
                        continue
                    if b"memtrack/agent/" in words or b"memtrack/cli/" in words or b"\0memtrack\0" in words:
                        self.seen[int(name)] = words


@pytest.fixture
def tokens():
    """A token for each place."""
    return {place: f"tok{secrets.token_hex(8)}" for place in PLACES}


def variables(tokens, home):
    """An environment that has all of them."""
    (home / ".netrc").write_text(f"machine 127.0.0.1 login me password {tokens['netrc']}\n")
    (home / ".netrc").chmod(0o600)
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(f"[default]\naws_secret_access_key = {tokens['aws_file']}\n")
    return {
        "HOME": str(home),
        "MLFLOW_TRACKING_USERNAME": tokens["username"],
        "MLFLOW_TRACKING_PASSWORD": tokens["password"],
        "MLFLOW_TRACKING_TOKEN": tokens["token"],
        "WANDB_API_KEY": tokens["wandb"],
        "COMET_API_KEY": tokens["comet"],
        "AWS_ACCESS_KEY_ID": tokens["aws_id"],
        "AWS_SECRET_ACCESS_KEY": tokens["aws_secret"],
        "AWS_SESSION_TOKEN": tokens["aws_session"],
        "AZURE_STORAGE_ACCESS_KEY": tokens["azure"],
        "ARGUMENT": tokens["argument"],
        "DATABASE_PASSWORD": tokens["variable"],
        "EXCEPTION": tokens["exception"],
        "PARAM": tokens["param"],
        "MEMTRACK_DEBUG": "1",
    }


def found_in(content, tokens):
    """The places whose tokens stand in ``content``, also as they are sent over the network."""
    found = []
    pairs = {kind: f"{tokens[user]}:{tokens[password]}" for kind, user, password in PAIRS}
    forms = {**tokens, **{name: base64.b64encode(pair.encode()).decode() for name, pair in pairs.items()}}
    for place, token in forms.items():
        # names and texts in a recording may be cut: a part of a token is too much already
        if token[:12].encode() in content:
            found.append(place)
    return found


def verb(env, *words):
    """What a verb of the command line says, on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "memtrack", *words],
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("end", ENDS)
def test_no_secret_gets_out(mlflow_server, train, tmp_path, tokens, end):
    """A run that is killed, fails, or ends: recording, log, report, list, delivery, and every command line."""
    home = tmp_path / "home"
    home.mkdir()
    more = variables(tokens, home)
    userinfo = f"http://{tokens['uri_user']}:{tokens['uri_password']}@"
    more["MLFLOW_TRACKING_URI"] = mlflow_server.uri.replace("http://", userinfo)
    flush_s, last = ENDS[end]
    source = SCRIPT.replace("FLUSH", str(flush_s)).replace("END", last)
    with Cmdlines() as cmdlines:
        script = train(source, None, wait=False, **more)
        script.wait_for("RESULT")
        if end == "killed":
            script.process.send_signal(signal.SIGKILL)
        training = script.finish(check=False)
        run_id = training.result["run_id"]
        folder = training.recording.parent
        env = environment(MEMTRACK_DIR=str(folder), **more)
        _await_end(mlflow_server, run_id)
        said = {
            words: verb(env, *words)
            for words in (
                ("sync",), ("ls",), ("report", "--json", "--all"), ("report", "--all"), ("doctor", "--no-metrics"),
            )
        }  # fmt: skip
    assert training.returncode == {"killed": -9, "exception": 1, "in order": 0}[end], training.stderr

    assert any(b"memtrack/agent/" in words for words in cmdlines.seen.values()), "no agent was seen"
    for words in cmdlines.seen.values():
        assert not found_in(words, tokens), words
    for name, content in said.items():
        assert content, name
        assert not found_in(content, tokens), (name, found_in(content, tokens))
    # Python prints the exception, and MLflow the address of the run with whatever stands in it
    lines = (training.stdout + training.stderr).splitlines()
    ours = [line for line in lines if not line.startswith(("RuntimeError", "🏃 View run", "🧪 View experiment"))]
    assert not found_in("\n".join(ours).encode(), tokens), ours
    assert found_in(training.stderr.encode(), tokens) == (["exception"] if end == "exception" else [])
    for path in folder.rglob("*"):
        if path.is_file():
            assert not found_in(path.read_bytes(), tokens), (path, found_in(path.read_bytes(), tokens))
    run = mlflow_server.client().get_run(run_id)
    assert run.info.status != "RUNNING"
    assert any(b"memtrack/cli/courier" in words for words in cmdlines.seen.values()) or end != "killed"
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("memtrack")}
    assert not found_in(repr((tags, sorted(run.data.metrics))).encode(), tokens)
    # that they were there to be found: MLflow has the parameter, the process its argument
    assert run.data.params["key"] == tokens["param"]
    assert training.recording.name.encode()[:10] in said[("ls",)]


def _await_end(server, run_id, timeout_s=15.0):
    """Wait until somebody has ended the run; one whose process was killed may stay as it is."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.client().get_run(run_id).info.status != "RUNNING":
            return
        time.sleep(0.2)


def test_program_without_its_arguments(run_child, tools, tmp_path):
    """The recording names what runs, by the script or the module alone, however its arguments are given."""
    from memtrack.collectors.procfs import program_name

    token = f"tok{secrets.token_hex(8)}"
    (tmp_path / "module.py").write_text("import time\ntime.sleep(60)\n")
    sleep = "import time; time.sleep(60)"
    cases = {
        "module.py": [sys.executable, "-u", f"{tmp_path}/module.py", token, f"--key={token}"],
        "module": [sys.executable, "-m", "module", token],
        "python -c": [sys.executable, "-c", f"{sleep}  # {token}", token],
        "sh": ["sh", "-c", f"sleep 60; : {token}", token],
        "sleep": ["sleep", "60"],
        # a program that gives itself a title, as some servers and trainers do
        "worker": ["sh", "-c", f"exec -a 'worker --key {token}' sleep 60"],
    }
    children = {}
    try:
        for name, command in cases.items():
            shell = {"executable": "/bin/bash"} if name == "worker" and os.path.exists("/bin/bash") else {}
            if name == "worker" and not shell:
                continue
            children[name] = subprocess.Popen(command, cwd=tmp_path, **shell)
        for name, child in children.items():
            tools.wait_until(lambda child=child, name=name: program_name(child.pid) == name)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
