"""Writing to one MLflow run: straight to a tracking server, or through whatever store MLflow has for the URI."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from memtrack.errors import DeliveryError, RejectedError
from memtrack_mlflow import _where

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "NOT_FOUND"}
"""Error codes of MLflow's own that no repetition will change. A permission that is lacking can be given."""

LOGGED = "mlflow.loggedArtifacts"
"""The tag in which MLflow notes which artifacts are tables, a JSON list (``mlflow.utils.mlflow_tags``)."""


class Value(NamedTuple):
    """One value of a metric, as MLflow keeps it."""

    key: str
    value: float
    timestamp: int
    """Milliseconds of Unix time."""
    step: int


class RunState(NamedTuple):
    """How a run stands."""

    status: str
    """``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED`` or ``SCHEDULED``."""
    start_time_ms: int
    """When it began, in milliseconds of Unix time."""
    is_deleted: bool
    artifact_uri: str
    logged_artifacts: str
    """What MLflow has noted of artifacts that it shows in a way of their own."""


class RunWriter(Protocol):
    """What the sink does to a run. All raise DeliveryError, or RejectedError where trying again is pointless."""

    def log(self, metrics: Sequence[Value], tags: Mapping[str, str]) -> None:
        """Log at most 1000 values, and tags."""

    def state(self) -> RunState:
        """How the run stands now."""

    def finish(self, end_time_ms: int, status: str = "FINISHED") -> None:
        """Mark the run ended."""


def run_writer(client: Any, run_id: str) -> RunWriter:
    """The writer for a run that ``client``, an ``MlflowClient``, can see."""
    store: Any = getattr(getattr(client, "_tracking_client", None), "store", None)
    rest = sys.modules.get("mlflow.store.tracking.rest_store")
    # a store that logs in a way of its own is left to it
    if rest is not None and getattr(type(store), "log_batch", None) is rest.RestStore.log_batch:
        return ServerRun(store.get_host_creds, run_id)
    return ClientRun(client, run_id)


class ServerRun:
    """A run at a tracking server. One request a call, which fails at once when the server does.

    ``MlflowClient`` repeats a request for minutes, inside the call, and says so in the log each time. Here the relay
    does that, which knows when the run ends and what came since. Address, credentials, headers, TLS and time-out are
    those of MLflow, and the connection is kept.
    """

    def __init__(self, host_creds: Callable[[], Any], run_id: str) -> None:
        self._host_creds = host_creds
        self._run_id = run_id
        self._request = import_module("mlflow.utils.rest_utils").http_request

    def log(self, metrics: Sequence[Value], tags: Mapping[str, str]) -> None:
        self._call(
            "POST",
            "log-batch",
            json={
                "run_id": self._run_id,
                # as MLflow does: JSON has no NaN and no infinity, the server takes these words
                "metrics": [metric._replace(value=_number(metric.value))._asdict() for metric in metrics],
                "tags": [{"key": key, "value": value} for key, value in tags.items()],
            },
        )

    def state(self) -> RunState:
        run = self._call("GET", "get", params={"run_id": self._run_id})["run"]
        info, tags = run["info"], {tag["key"]: tag["value"] for tag in run.get("data", {}).get("tags", ())}
        is_deleted = info.get("lifecycle_stage") == "deleted"
        return RunState(
            info["status"], int(info["start_time"]), is_deleted, info.get("artifact_uri", ""), tags.get(LOGGED, "")
        )

    def finish(self, end_time_ms: int, status: str = "FINISHED") -> None:
        self._call("POST", "update", json={"run_id": self._run_id, "status": status, "end_time": end_time_ms})

    def _call(self, method: str, endpoint: str, **what: Any) -> Any:
        try:
            creds = self._host_creds()
            response = self._request(
                creds,
                f"/api/2.0/mlflow/runs/{endpoint}",
                method,
                max_retries=0,
                retry_codes=frozenset(),
                raise_on_status=False,
                **what,
            )
        except Exception as exc:
            raise DeliveryError(f"no answer from the tracking server: {reason(exc)}") from exc
        try:
            answer = json.loads(response.text)  # a proxy that answers nothing has not delivered anything
        except ValueError:
            answer = None
        if response.status_code == 200 and answer is not None:
            return answer
        hint = _where.refusal_hint(response.status_code, creds)
        raise refusal(response, answer if isinstance(answer, dict) else {}, hint)


class ClientRun:
    """A run behind any other store, such as a database that this process writes to itself."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._entities = import_module("mlflow.entities")

    def log(self, metrics: Sequence[Value], tags: Mapping[str, str]) -> None:
        translate(
            self._client.log_batch,
            self._run_id,
            metrics=[self._entities.Metric(*metric) for metric in metrics],
            tags=[self._entities.RunTag(key, value) for key, value in tags.items()],
        )

    def state(self) -> RunState:
        run = translate(self._client.get_run, self._run_id)
        info, is_deleted = run.info, run.info.lifecycle_stage == "deleted"
        logged = run.data.tags.get(LOGGED, "")
        return RunState(info.status, int(info.start_time), is_deleted, info.artifact_uri or "", logged)

    def finish(self, end_time_ms: int, status: str = "FINISHED") -> None:
        translate(self._client.set_terminated, self._run_id, status, end_time_ms)


def translate(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call MLflow; what it raises becomes DeliveryError, or RejectedError where trying again is pointless."""
    try:
        return call(*args, **kwargs)
    except Exception as exc:
        code = str(getattr(exc, "error_code", ""))
        said = _first_line(exc)
        text = f"{code or type(exc).__name__}: {_without_secrets(said)}{_certificate_hint(said)}"
        # the traceback of a cause that names a password would show it
        raise _error(code)(text) from (exc if said in text else None)


def refusal(response: Any, answer: dict[str, Any], hint: str) -> DeliveryError:
    """What a bad answer means. Only MLflow's own error codes are final: a proxy's 404 may pass."""
    code = str(answer.get("error_code", ""))
    text = f"{code or f'HTTP {response.status_code}'}: {_first_line(answer.get('message') or response.reason)}{hint}"
    if response.status_code < 500 and _error(code) is RejectedError:
        return RejectedError(text)
    try:
        retry_after_s = float(response.headers.get("Retry-After", ""))
    except ValueError:
        retry_after_s = None
    return DeliveryError(text, retry_after_s)


def _error(code: str) -> type[DeliveryError]:
    return RejectedError if code in REFUSED else DeliveryError


def reason(exc: BaseException) -> str:
    """The innermost cause, which says what happened in a few words."""
    while (inner := exc.__cause__ or exc.__context__ or _last_argument(exc)) is not None:
        exc = inner
    text = (exc.strerror if isinstance(exc, OSError) else None) or _first_line(exc) or type(exc).__name__
    return _without_secrets(text) + _certificate_hint(text)


def _without_secrets(text: str) -> str:
    """A text with the addresses in it as they may be written down."""
    return re.sub(r"[\w+.-]+://\S+", lambda found: _where.public(found[0]), text)


def _certificate_hint(text: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" not in text:
        return ""
    return "; if a CA of your own has signed it, set MLFLOW_TRACKING_SERVER_CERT_PATH to its certificate"


def _last_argument(exc: BaseException) -> BaseException | None:
    """What urllib3 puts there instead of a cause."""
    return exc.args[-1] if exc.args and isinstance(exc.args[-1], BaseException) else None


def _first_line(text: object) -> str:
    return str(text).partition("\n")[0]


def _number(value: float) -> Any:
    if value != value:
        return "NaN"
    return "Infinity" if value == float("inf") else "-Infinity" if value == float("-inf") else value
