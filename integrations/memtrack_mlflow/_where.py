"""Where a run is: tracking URIs that may be written down, and what a process needs to get there."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from memtrack.errors import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIXES = ("MLFLOW_", "DATABRICKS_", "AWS_", "AZURE_", "ARM_", "GOOGLE_", "SSL_CERT_")
VARIABLES = {
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("no_proxy", "http_proxy", "https_proxy", "all_proxy"),
}
SQLITE = "sqlite:///"
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")
CREDENTIALS = "~/.mlflow/credentials"
"""Where MLflow looks for a user name and a password that the environment does not have."""


def environment(uri: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that MLflow and its stores are told by how to reach a server. Secrets are among them."""
    found = {name: value for name, value in environ.items() if name.startswith(PREFIXES) or name in VARIABLES}
    # one that has been taken away is told as empty: who delivers later began with those of the start, and MLflow sends
    # a user name that it finds rather than a token
    return {**dict.fromkeys(SECRETS, ""), **found, "MLFLOW_TRACKING_URI": uri}


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
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri.partition("?")[0] if ":" in uri else uri
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
    elif ":" in authority:
        # SQLAlchemy takes a password with a slash in it, others do with a mark that should have been quoted
        rest = rest.rpartition("@")[2]
    return scheme + mark + re.split("[?#]", rest, maxsplit=1)[0]


def known(uri: str) -> str:
    """A public URI with what this process knows of it besides: that of its environment if both mean the same."""
    own = absolute(os.environ.get("MLFLOW_TRACKING_URI", "") or uri)
    return own if public(own).rstrip("/") == uri.rstrip("/") else uri


def check_trusted(uri: str) -> None:
    """Raise DeliveryError if this process's credentials would go to a server that they are not meant for.

    ``uri`` comes from a recording, which somebody else may have made: credentials go to the configured server only.
    """
    # The path does not matter: whoever runs a server sees what is sent to any of its paths, and where many projects
    # share a server, as at dagshub.com/USER/REPO.mlflow, the credentials are the user's and not the project's.
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not urlsplit(uri).netloc or _server(uri) == _server(own):
        return
    if any(os.environ.get(name) for name in SECRETS) or os.path.exists(os.path.expanduser(CREDENTIALS)):
        raise DeliveryError(
            f"the recording names {public(uri)}, and the credentials in MLFLOW_TRACKING_* or {CREDENTIALS} may be for "
            f"another server. If they are for this one, set MLFLOW_TRACKING_URI={public(uri)}"
        )


def _server(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def refusal_hint(status: int, creds: Any) -> str:
    """What to do about a 401 or 403, given the MlflowHostCreds that were sent; "" for any other status."""
    if creds.username and creds.password:
        sent = f"the user name and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or {CREDENTIALS}"
    elif creds.token:
        sent = "the token in MLFLOW_TRACKING_TOKEN"
    elif _server(creds.host)[1] != urlsplit(creds.host).netloc:
        sent = "the user name and password in the tracking URI"
    elif creds.auth:
        sent = f"what MLFLOW_TRACKING_AUTH={creds.auth} has sent"
    else:
        sent = ""
    if status == 401 and not sent:
        return "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 401:
        return f"; the tracking server does not accept {sent}"
    return "; the tracking server does not let this user write to the run" if status == 403 else ""


def check_there(uri: str) -> None:
    """Raise DeliveryError for a store in a file that is not there: MLflow would make a new, empty one."""
    path = uri.removeprefix(SQLITE).partition("?")[0] if uri.startswith(SQLITE) else uri.removeprefix("file://")
    if path.startswith("/") and not os.path.exists(path):
        raise DeliveryError(f"{path} is not there")
