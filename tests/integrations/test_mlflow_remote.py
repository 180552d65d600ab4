"""MLflow servers that want to know who comes: credentials, certificates, a path of their own, artifacts by proxy.

What delivers after a death has them from the dead process, in memory; ``memtrack sync`` takes them from its own
environment. DagsHub's site could not be reached from where this was written: its real client talks to a stand-in
with the two documents that it asks for, which has a real MLflow server under ``/USER/REPO.mlflow``.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import threading
import time
import urllib.request
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from memtrack.errors import DeliveryError
from memtrack.recording.reader import RecordingReader
from tests.integrations.mlflow_lab import Proxy, Server, Store, environment, scripts
from tests.integrations.test_mlflow_sync import (
    IMPATIENT,
    check_ended,
    check_once,
    couriers,
    delivered,
    kill,
    recordings,
    sync,
    traces,
    training,
    until,
)

pytest.importorskip("mlflow")
pytest.importorskip("dagshub")
pytest.importorskip("flask_wtf", reason="MLflow's basic-auth app needs it")
trustme = pytest.importorskip("trustme")

pytestmark = pytest.mark.timeout(240)  # the fixtures start two servers and eight trainings

ADMIN, BOB = "admin:adm1n-s3cret-w0rd", "bob:b0b-s3cret-w0rd-too"
WRONG = "wr0ng-s3cret-w0rd"
TOKENS = ("tok3n-remote-one", "tok3n-remote-two")
KEY = "k3y-of-the-header"
ADA = "ada:dagshub-t0k3n-of-ada"
SECRETS = {
    *(pair.partition(":")[2] for pair in (ADMIN, BOB, ADA)),
    *(base64.b64encode(pair.encode()).decode()[:20] for pair in (ADMIN, BOB, ADA)),
    *(WRONG, *TOKENS, KEY),
}
PERSON: dict[str, Any] = dict.fromkeys(
    ("full_name", "avatar_url", "public_email", "website", "company", "description"), ""
)
PERSON |= {"id": 1, "login": "ada", "username": "ada"}
REPO: dict[str, Any] = dict.fromkeys(
    ("description", "html_url", "ssh_url", "clone_url", "website", "default_branch", "created_at", "updated_at"), ""
)
REPO |= dict.fromkeys(("size", "stars_count", "forks_count", "watchers_count", "open_issues_count"), 0)
REPO |= dict.fromkeys(("private", "fork", "empty", "mirror"), False)
REPO |= {"id": 1, "owner": PERSON, "name": "model", "full_name": "ada/model", "parent": None, "permissions": None}

HEADERS = """
import os
class Headers:
    def in_context(self):
        return True
    def request_headers(self):
        return {"X-Lab-Key": os.environ["LAB_KEY"]}
"""


def basic(pair):
    """The header for a user and a password."""
    return "Basic " + base64.b64encode(pair.encode()).decode()


def variables(pair):
    """What MLflow reads a user and a password from."""
    user, _, password = pair.partition(":")
    return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}


def setting(names):
    """Code that sets environment variables."""
    return f"os.environ.update({names!r})"


@pytest.fixture(scope="module")
def lab(_server, mlflow_template, tmp_path_factory):
    """Servers and what it takes to get to them.

    ``fortress`` is MLflow's own server with TLS, basic auth, a path and an artifact store behind it, ``inside`` its
    store without all that. The proxies stand before the server of all tests, ``_server``.
    """
    folder = tmp_path_factory.mktemp("remote")
    with ExitStack() as stack:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        authority.issue_cert("me@example.org").private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
        inside = Store(f"sqlite:///{folder}/mlflow.db")
        (folder / "mlflow.db").write_bytes(mlflow_template.read_bytes())
        inside.client().create_experiment("remote", artifact_location="mlflow-artifacts:/remote")
        stack.callback(_forget, inside)
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
            f"admin_password = {ADMIN.partition(':')[2]}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        fortress = Server(
            folder,
            *("--app-name", "basic-auth", "--static-prefix", "/mlflow"),
            *("--serve-artifacts", "--artifacts-destination", f"file://{folder}/kept"),
            *("--uvicorn-opts", f"--ssl-keyfile {folder}/key.pem --ssl-certfile {folder}/cert.pem"),
            prefix="/mlflow",
            context=ssl.create_default_context(cafile=str(folder / "ca.pem")),
            variables={"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "flask"},
        )
        stack.callback(fortress.stop)
        other = threading.Thread(target=_server.start)
        other.start()
        fortress.start()
        other.join()
        assert _server.healthy()
        _add_user(fortress, BOB)

        contexts = [ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) for _ in range(2)]
        for context in contexts:
            certificate.configure_cert(context)
        authority.configure_trust(contexts[1])
        contexts[1].verify_mode = ssl.CERT_REQUIRED
        token, header, client = Proxy(_server), Proxy(_server, context=contexts[0]), Proxy(_server, context=contexts[1])
        dagshub = Proxy(
            _server, prefix="/ada/model.mlflow", site={"/api/v1/user": PERSON, "/api/v1/repos/ada/model": REPO}
        )
        for proxy in (token, header, client, dagshub):
            stack.callback(proxy.close)
        header.gate = lambda headers: None if headers.get("X-Lab-Key") == KEY else 403
        known = {basic(ADA), "Bearer " + ADA.partition(":")[2]}
        dagshub.gate = lambda headers: None if headers.get("Authorization") in known else 401

        home = folder / "home"
        (home / ".mlflow").mkdir(parents=True)
        lines = [f"{name.lower()} = {text}" for name, text in variables(ADMIN).items()]
        (home / ".mlflow" / "credentials").write_text("\n".join(["[mlflow]", *lines]))
        yield SimpleNamespace(
            folder=folder, inside=inside, fortress=fortress, server=_server, home=str(home), ca=str(folder / "ca.pem"),
            token=token, header=header, client=client, dagshub=dagshub,
        )  # fmt: skip


def _forget(store):
    from mlflow.tracking._tracking_service.utils import _get_store

    _get_store(store.uri).engine.dispose()


def _add_user(server, pair):
    user, _, password = pair.partition(":")
    request = urllib.request.Request(
        f"{server.uri}/api/2.0/mlflow/users/create",
        json.dumps({"username": user, "password": password}).encode(),
        {"Authorization": basic(ADMIN), "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30, context=server._context) as answer:
        assert answer.status == 200


def check_secrets(folder, outputs):
    """Assert that no secret stands in a file of a folder, in a process's arguments, or in what was printed.

    MLflow itself prints the address of a run with whatever stands in it.
    """
    assert not traces(folder, SECRETS)
    lines = [line for output in outputs for line in output.splitlines() if not line.startswith(("🏃", "🧪"))]
    assert not [line for line in lines if any(secret in line for secret in SECRETS)]


# -- while the process lives, and when it is dead -----------------------------------------------------------------

ARTIFACT = """
    with open('model.bin', 'wb') as file:
        file.write(bytes(range(256)) * 4000)
    mlflow.log_artifact('model.bin')
"""
EXCHANGE = f"""
    while not os.path.exists('go'):
        time.sleep(0.02)
    os.environ['MLFLOW_TRACKING_TOKEN'] = {TOKENS[1]!r}
"""


def ways(lab):
    """By name: the store to look into, the server's address, the environment at the start, and the parts of a script.

    Secrets are set by code, after ``autolog`` where that matters: the agent was started without them.
    """
    ca = {"MLFLOW_TRACKING_SERVER_CERT_PATH": lab.ca}
    remote = {"MLFLOW_EXPERIMENT_NAME": "remote", **ca}
    login = setting(variables(ADMIN))
    inside = lab.fortress.uri.replace("https://", f"https://{ADMIN}@")
    init = f"import dagshub\ndagshub.init('model', 'ada', host={lab.dagshub.uri.removesuffix('/ada/model.mlflow')!r})"
    user = {"DAGSHUB_USER_TOKEN": ADA.partition(":")[2], "HOME": str(lab.folder), "DAGSHUB_DISABLE_ANALYTICS": "1"}
    stale = (
        f"del os.environ['MLFLOW_TRACKING_USERNAME'], os.environ['MLFLOW_TRACKING_PASSWORD']\n"
        f"os.environ['MLFLOW_TRACKING_TOKEN'] = {TOKENS[0]!r}"
    )
    plugins = os.pathsep.join([str(lab.folder / "plugins"), environment()["PYTHONPATH"]])
    return {
        "basic": (lab.inside, lab.fortress, remote, {"between": login, "body": ARTIFACT.strip()}),
        "credentials file": (lab.inside, lab.fortress, {"HOME": lab.home, **remote}, {}),
        "in the address": (lab.inside, None, remote, {"between": f"mlflow.set_tracking_uri({inside!r})"}),
        "token": (
            lab.server,
            lab.token,
            variables(f"ada:{WRONG}"),
            {"between": stale, "body": EXCHANGE.strip()},
        ),
        "CA and header": (
            lab.server,
            lab.header,
            {"LAB_KEY": KEY, "PYTHONPATH": plugins},
            {"between": setting({"REQUESTS_CA_BUNDLE": lab.ca})},
        ),
        "client certificate": (
            lab.server,
            lab.client,
            {},
            {
                "between": setting(
                    {
                        "MLFLOW_TRACKING_INSECURE_TLS": "true",
                        "MLFLOW_TRACKING_CLIENT_CERT_PATH": f"{lab.folder}/client.pem",
                    }
                )
            },
        ),
        "DagsHub before": (lab.server, None, user, {"before": init}),
        "DagsHub after": (lab.server, None, user, {"between": init}),
    }


WAYS = (
    "basic", "credentials file", "in the address", "token", "CA and header", "client certificate", "DagsHub before",
    "DagsHub after",
)  # fmt: skip


@pytest.fixture(scope="module")
def lives(lab, tmp_path_factory):
    """A training each way, all at the same time, which is killed when windows have arrived.

    name -> (store, run id, recording, how many points had arrived of its memory, what it printed).
    """
    folder = tmp_path_factory.mktemp("ways")
    plugin = lab.folder / "plugins" / "lab_headers-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-headers\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[mlflow.request_header_provider]\nlab = lab_headers:Headers\n")
    (plugin.parent / "lab_headers.py").write_text(HEADERS)
    valid = {f"Bearer {TOKENS[0]}"}
    lab.token.gate = lambda headers: None if headers.get("Authorization") in valid else 401
    with ExitStack() as stack:
        known = ways(lab)
        assert tuple(known) == WAYS
        started = {}
        for number, (way, (_, server, env, parts)) in enumerate(known.items()):
            (folder / str(number)).mkdir()
            run = stack.enter_context(scripts(folder / str(number)))
            started[way] = run(training(flush=0.2, **parts), server, wait=False, **env)
        ids = {way: script.wait_for("STARTED") for way, script in started.items()}
        alive = {way: _arrived(known[way][0], ids[way]) for way in started}
        # the token is taken back, and another one given half a second later
        valid.clear()
        time.sleep(0.5)
        (started["token"].folder / "go").touch()
        valid.add(f"Bearer {TOKENS[1]}")
        before = _arrived(lab.server, ids["token"])
        _arrived(lab.server, ids["token"], before + 5)
        outputs = {}
        for way, script in started.items():
            kill(script)
            training_ = script.finish(check=False)
            outputs[way] = training_.stdout + training_.stderr
        paths = {way: recordings(script)[0] for way, script in started.items()}
        deadline = time.monotonic() + 60
        seen = []
        while not all(delivered(path) for path in paths.values()) and time.monotonic() < deadline:
            seen += traces(folder / "0" / "recordings", SECRETS)
            time.sleep(0.2)
        assert not seen
        yield {way: (known[way][0], ids[way], paths[way], alive[way], outputs[way]) for way in paths}


def _arrived(store, run_id, at_least=3):
    """How many points of the process's memory MLflow has, once it has some."""
    client, found = store.client(), []

    def enough():
        found[:] = client.get_metric_history(run_id, "system/memory/process/rss_mib")
        return len(found) >= at_least

    until(enough)
    return len(found)


@pytest.mark.parametrize("way", WAYS)
def test_alive_and_dead(way, lives, lab):
    """Windows arrive while it trains, the rest after its death; every one once, and no secret is seen anywhere.

    With a token that is taken back and replaced while the run goes on, instead of a password that the process began
    with; with a header that a plugin of MLflow's adds; and through DagsHub's client, called before memtrack is imported
    or after ``autolog``.
    """
    store, run_id, path, alive, output = lives[way]
    assert delivered(path)
    assert check_once(store, run_id, path) > alive >= 3
    tags = check_ended(store, run_id, "KILLED")
    assert tags["verdict"] == "unknown SIGKILL"
    assert tags["dropped"] == "0"
    with RecordingReader(str(path)) as reader:
        (feed,) = reader.feeds()
    server = ways(lab)[way][1] or (lab.fortress if way == "in the address" else lab.dagshub)
    assert feed.target["uri"] == server.uri, "with its path, and without who it is for"
    check_secrets(path.parent, [output])
    said = [line for line in output.splitlines() if "does not take its windows" in line]
    assert len(said) == (way == "token"), said
    assert way != "token" or "HTTP 401: Unauthorized; the tracking server does not accept the token" in said[0]


def test_artifacts_by_proxy(lives, lab):
    """The user's own artifact, in the server's store, through the same server and in the same run."""
    _, run_id, _, _, _ = lives["basic"]
    kept = lab.folder / "kept" / "remote" / run_id / "artifacts" / "model.bin"
    assert kept.read_bytes() == bytes(range(256)) * 4000


# -- without what it takes ----------------------------------------------------------------------------------------

WAITING = """
import memtrack
monitor = memtrack.start(sinks=["mlflow"], interval=0.1, flush_interval=0.2)
print("STARTED", flush=True)
steps = 0
while not os.path.exists("go"):
    memtrack.step(steps)
    steps += 1
    time.sleep(0.01)
monitor.stop()
report(steps=steps)
"""

CERTIFICATE = "certificate verify failed.*; .*set MLFLOW_TRACKING_SERVER_CERT_PATH"
ASKED = "HTTP 401: [A-Za-z]+; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def lacks(lab):
    """By name: store, server, what the training lacks, what it says, what sync lacks, what it says, and what it takes.

    The last is an address or None, and the environment.
    """
    ca = {"MLFLOW_TRACKING_SERVER_CERT_PATH": lab.ca}
    inside = Store(lab.fortress.uri.replace("https://", f"https://{ADMIN}@"))
    denied = "HTTP 403: [A-Za-z]+; the tracking server does not let this user write to the run"
    wrong = "HTTP 401: [A-Za-z]+; the tracking server does not accept the user name and password in MLFLOW_TRACKING_US"
    return {
        "wrong password": (
            (lab.inside, lab.fortress, {**ca, **variables(f"admin:{WRONG}")}, wrong),
            (lab.fortress, ca, ASKED),
            (lab.fortress, {**ca, **variables(ADMIN)}),
        ),
        "no CA": (
            (lab.inside, lab.fortress, variables(ADMIN), CERTIFICATE),
            (lab.fortress, variables(ADMIN), CERTIFICATE),
            (inside, ca),
        ),
        "not allowed": (
            (lab.inside, lab.fortress, {**ca, **variables(BOB)}, denied),
            (None, {**ca, "HOME": lab.home}, f"MLFLOW_TRACKING_URI={lab.fortress.uri}"),
            (lab.fortress, {**ca, "HOME": lab.home}),
        ),
        "nobody at DagsHub": (
            (lab.server, lab.dagshub, {}, ASKED),
            (lab.dagshub, {}, ASKED),
            (lab.dagshub, variables(ADA)),
        ),
    }


def test_without_access(lab, tmp_path):
    """A training says once what is wrong, and goes on; `memtrack sync` says what is missing, and delivers with it.

    The runs were made by somebody else, and the training has their ids: MLflow alone would have raised.
    """
    with ExitStack() as stack:
        known = lacks(lab)
        started, ids = {}, {}
        for number, (name, ((store, server, env, _), *_)) in enumerate(known.items()):
            (tmp_path / str(number)).mkdir()
            ids[name] = store.client().create_run("0" if store is lab.server else _experiment(store)).info.run_id
            run = stack.enter_context(scripts(tmp_path / str(number)))
            more = {"MLFLOW_RUN_ID": ids[name], "HOME": str(tmp_path), **env, **IMPATIENT}
            started[name] = run(WAITING, server, wait=False, **more)
        for script in started.values():
            script.wait_for("STARTED")
            until(lambda script=script: "Training goes on" in script._err.read_text())
        time.sleep(1.5)
        for script in started.values():
            (script.folder / "go").touch()
        paths = {}
        for name, script in started.items():
            done = script.finish()
            paths[name] = done.recording
            assert done.result["steps"] > 30
            said = [line for line in done.stderr.splitlines() if "Training goes on" in line]
            assert len(said) == 1, said
            assert re.search(known[name][0][3], said[0]), said
            check_secrets(done.recording.parent, [done.stdout, done.stderr])
        # who delivers for them with what they had has given up
        until(lambda: not any(couriers(path) for path in paths.values()), 60)
        for turn, status in ((1, 1), (2, 0)):
            syncs = {}
            for name, course in known.items():
                server, env, *_ = course[turn]
                process = sync(paths[name].parent, server, env={"HOME": str(tmp_path), **env})
                syncs[name] = stack.enter_context(process)
            outputs = {name: process.communicate(timeout=60)[0] for name, process in syncs.items()}
            assert {name: process.returncode for name, process in syncs.items()} == dict.fromkeys(syncs, status), (
                outputs
            )
            for name, output in outputs.items():
                waits = re.search(r"0 windows delivered, \d+ wait: ", output)
                assert bool(waits) == (turn == 1), output
                assert turn == 2 or re.search(known[name][1][2], output), output
                assert delivered(paths[name]) == (turn == 2)
                check_secrets(paths[name].parent, [output])
                assert "\n" not in output.strip(), "in one sentence"
        for name, ((store, *_), *_) in known.items():
            assert check_once(store, ids[name], paths[name]) >= 10


def _experiment(store):
    return store.client().get_experiment_by_name("remote").experiment_id


# -- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("https://dagshub.com/ada/model.mlflow", "https://dagshub.com/ada/model.mlflow"),
        ("https://ada:w0rd@dagshub.com:443/ada/model.mlflow/?token=w0rd#w0rd", "https://dagshub.com:443/ada/model.mlflow/"),
        ("https://w0rd@host", "https://host"),
        ("http://ada:w0@rd@host/mlflow", "http://host/mlflow"),
        ("postgresql://ada:w0/rd@db/mlflow?sslpassword=w0rd", "postgresql://db/mlflow"),
        ("http://ada:1#w0rd@host/mlflow", "http://host/mlflow"),
        ("http://ada:1?w0rd@host/mlflow", "http://host/mlflow"),
        ("http://host/@ada/model", "http://host/@ada/model"),
        ("sqlite:////data/a@b.db?w0rd", "sqlite:////data/a@b.db"),
        ("file:///data/a@b", "file:///data/a@b"),
        ("databricks", "databricks"),
    ],
)  # fmt: skip
def test_what_is_written_down(uri, public):
    """An address keeps its path and loses what may be secret, also where that should have been quoted and was not.

    A password with a slash in it, which SQLAlchemy takes, once stood in the recording.
    """
    from memtrack_mlflow import _where

    assert _where.public(uri) == public
    assert _where.public(public) == public


@pytest.mark.parametrize(
    ("status", "creds", "words"),
    [
        (401, {}, "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
        (401, {"username": "ada"}, "; set MLFLOW_TRACKING_USERNAME and"),
        (401, {"host": "https://ada:w0rd@host"}, "; the tracking server does not accept the user name and password in"),
        (401, {"auth": "kubernetes"}, "; the tracking server does not accept what MLFLOW_TRACKING_AUTH=kubernetes"),
        (
            401,
            {"token": "w0rd", "username": "ada", "password": "w0rd"},
            "; the tracking server does not accept the use",
        ),
        (403, {"token": "w0rd"}, "; the tracking server does not let this user write to the run"),
        (404, {"token": "w0rd"}, ""),
    ],
)
def test_what_to_do_about_a_refusal(status, creds, words):
    """It names what MLflow has sent, which is the password if there is a token as well, and says no secret."""
    from memtrack_mlflow._where import refusal_hint
    from mlflow.utils.rest_utils import MlflowHostCreds

    hint = refusal_hint(status, MlflowHostCreds(**{"host": "https://host", **creds}))
    assert hint.startswith(words)
    assert bool(hint) == bool(words)
    assert "w0rd" not in hint


@pytest.mark.parametrize("address", ["http://ada:w0rd@127.0.0.1:9/mlflow", "http://ada:w0/w0rd@127.0.0.1:9/mlflow"])
def test_a_server_that_is_not_there(address, monkeypatch):
    """What is raised at the start names the address as it may be written down; a password in it once stood there."""
    import traceback

    from memtrack_mlflow import MlflowSink

    for name, text in IMPATIENT.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(DeliveryError, match=r"http://127\.0\.0\.1:9/mlflow") as raised:
        MlflowSink(tracking_uri=address)
    assert "w0rd" not in "".join(traceback.format_exception(raised.value))


def test_one_server_for_all_its_paths(monkeypatch, tmp_path):
    """Credentials go to any path of the configured server, and to no other; those of the file in HOME as well."""
    from memtrack_mlflow import _where

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:w0rd@dagshub.com/ada/model.mlflow")
    for name in _where.SECRETS:
        monkeypatch.delenv(name, raising=False)
    mine, other = "https://dagshub.com/ada/other.mlflow", "https://elsewhere.org/ada/model.mlflow"
    _where.check_trusted(other)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").touch()
    _where.check_trusted(mine)
    with pytest.raises(DeliveryError, match=r"set MLFLOW_TRACKING_URI=https://elsewhere\.org/ada/model\.mlflow$"):
        _where.check_trusted(other)
    with pytest.raises(DeliveryError):
        _where.check_trusted(mine.replace("https", "http"))
    assert _where.known("https://dagshub.com/ada/model.mlflow") == "https://ada:w0rd@dagshub.com/ada/model.mlflow"
    assert _where.known(mine) == mine
