"""Where a run is: tracking URIs that may be written down, and what a process needs to get there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from memtrack.errors import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIXES = ("MLFLOW_", "DATABRICKS_", "AWS_", "AZURE_", "ARM_", "GOOGLE_", "SSL_CERT_")
VARIABLES = {
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("no_proxy", "http_proxy", "https_proxy", "all_proxy"),
}
SQLITE = "sqlite:///"
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")


def environment(uri: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that MLflow and its stores are told by how to reach a server. Secrets are among them."""
    found = {name: value for name, value in environ.items() if name.startswith(PREFIXES) or name in VARIABLES}
    return {**found, "MLFLOW_TRACKING_URI": uri}


def absolute(uri: str) -> str:
    """The URI, if it is a path or has one on this machine, as it is understood from any working directory."""
    if uri.startswith(SQLITE):
        path, mark, query = uri.removeprefix(SQLITE).partition("?")
        return uri if path in ("", ":memory:") else f"{SQLITE}{os.path.abspath(path)}{mark}{query}"
    parts = urlsplit(uri)
    if parts.scheme == "file" and not parts.netloc:
        return f"file://{os.path.abspath(parts.path)}"
    if not parts.scheme and not uri.startswith(("databricks", "uc")):
        return os.path.abspath(uri)
    return uri


def public(uri: str) -> str:
    """The URI without user, password and query, which may hold a token."""
    parts = urlsplit(uri)
    return (
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if parts.netloc else _bare(uri)
    )


def _bare(uri: str) -> str:
    # urlunsplit would take slashes away
    return uri.partition("?")[0] if ":" in uri else uri


def known(uri: str) -> str:
    """A public URI with what this process knows of it besides: that of its environment if both mean the same."""
    own = absolute(os.environ.get("MLFLOW_TRACKING_URI", "") or uri)
    return own if public(own).rstrip("/") == uri.rstrip("/") else uri


def check_trusted(uri: str) -> None:
    """Raise DeliveryError if this process's credentials would go to a server that they are not meant for.

    ``uri`` comes from a recording, which somebody else may have made: credentials go to the configured server only.
    """
    parts = urlsplit(uri)
    own = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if not parts.netloc or (parts.scheme, parts.netloc.rpartition("@")[2]) == (
        own.scheme,
        own.netloc.rpartition("@")[2],
    ):
        return
    if any(os.environ.get(name) for name in SECRETS):
        raise DeliveryError(
            f"the recording names {public(uri)}, and the credentials in MLFLOW_TRACKING_* may be for another server. "
            f"If they are for this one, set MLFLOW_TRACKING_URI={public(uri)}"
        )


def check_there(uri: str) -> None:
    """Raise DeliveryError for a store in a file that is not there: MLflow would make a new, empty one."""
    path = uri.removeprefix(SQLITE).partition("?")[0] if uri.startswith(SQLITE) else uri.removeprefix("file://")
    if path.startswith("/") and not os.path.exists(path):
        raise DeliveryError(f"{path} is not there")
