"""Where a run is, and how another process goes on with it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memtrack.errors import DeliveryError, MissingDependencyError, RejectedError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TARGET = 300
"""Characters that an address may have in the recording."""

NOT_HANDED_OVER = {"WANDB_SERVICE"}
"""Where the process of W&B's is that served the training process: it dies with it."""

VARIABLES = {
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC"),
    *("NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "http_proxy", "https_proxy"),
}

QUIET = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 0.2,
    "console": "off",
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "symlink": False,
    "silent": True,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}
"""Settings of a run that only adds to what another process has left: it says nothing of itself."""

GUEST = {"x_primary": False, "x_update_finish_state": False}
"""Settings besides where others may still write to the run: it is theirs to end."""


def address(run: Any, exit_code: int | None) -> dict[str, str]:
    """Which run it is, where its files are, and what it is called, as far as there is room."""
    settings = run.settings
    found = {"id": run.id, "mode": settings.mode, "start": f"{run.start_time:.3f}"}
    if exit_code is not None:
        found["exit"] = str(exit_code)
    if settings.mode == "offline":
        found["dir"] = os.path.abspath(settings.root_dir)
    more = {
        "project": settings.project,
        "entity": settings.entity,
        "label": label_of(settings),
        "job_type": settings.run_job_type,
        "group": settings.run_group,
        "name": settings.run_name,
    }
    room = MAX_TARGET - sum(len(name) + len(text) for name, text in found.items())
    for name, text in more.items():
        if text and text.isprintable() and len(name) + len(text) <= room:
            found[name] = text
            room -= len(name) + len(text)
    return found


def label_of(settings: Any) -> str:
    """How this process is told apart from others that write to the same run; mostly it is not."""
    return getattr(settings, "x_label", None) or ""


def environment(api_key: str | None, base_url: str | None) -> dict[str, str]:
    """What W&B is told by how to reach its server, also what the code said. Secrets are among it."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name in VARIABLES or (name.startswith("WANDB_") and name not in NOT_HANDED_OVER)
    }
    if api_key:
        found["WANDB_API_KEY"] = api_key
    if base_url:
        found["WANDB_BASE_URL"] = base_url
    return found


def resume(target: Mapping[str, str]) -> Any:
    """Go on with a run. Raises DeliveryError, or RejectedError if the server knows no such run.

    Offline this makes another folder with the same id beside the first, and notes in it that it goes on with that run,
    so that ``wandb sync`` adds the one to the other.
    """
    try:
        wandb = import_module("wandb")
    except ImportError as exc:
        raise MissingDependencyError("the 'wandb' sink", "wandb") from exc
    mode, root = target["mode"], target.get("dir")
    if root is not None and not os.path.isdir(root):
        raise DeliveryError(f"{root} is not there")
    for name in NOT_HANDED_OVER:
        os.environ.pop(name, None)
    wanted = {**QUIET, **(GUEST if mode == "shared" else {}), "x_label": target.get("label")}
    try:
        settings = wandb.Settings(**{name: wanted[name] for name in wanted if name in wandb.Settings.model_fields})
        run = wandb.init(
            id=target["id"],
            mode=mode,
            dir=root,
            # offline nobody knows whether the first part ever came to the server
            resume=None if mode == "shared" else "allow" if mode == "offline" else "must",
            reinit="create_new",
            project=target.get("project"),
            entity=target.get("entity"),
            group=target.get("group"),
            job_type=target.get("job_type"),
            name=target.get("name"),
            settings=settings,
        )
    except Exception as exc:
        if "has not been initialized" in str(exc):
            raise RejectedError(f"W&B has no run {target['id']} any more", run_gone=True) from exc
        # not refused: this process may lack the key that the other one had
        raise DeliveryError(f"W&B cannot go on with the run: {first_line(exc)}") from exc
    _set_start(run, float(target.get("start", "0")))
    return run


def _set_start(run: Any, start_s: float) -> None:
    """Let the time of a run that is gone on with count from its first start, not from now.

    Where this version of W&B has other names for it, charts over relative time are shifted, those over time are not.
    """
    interface: Any = getattr(run, "_interface", None)
    if start_s and hasattr(run, "_start_time") and hasattr(interface, "publish_run"):
        run._start_time = start_s
        interface.publish_run(run)


def first_line(exc: BaseException) -> str:
    """What an exception says, in a line."""
    return str(exc).strip().partition("\n")[0] or type(exc).__name__
