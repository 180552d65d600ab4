"""Autolog in every Python below ``memtrack run``. Loads nothing more until a tracker is imported, starts nothing until
one of its runs does."""

from memtrack import imports

TRACKERS = {"comet_ml": "comet", "mlflow": "mlflow", "wandb": "wandb"}
"""What the trackers' modules are followed as; ``memtrack.registry`` knows the same, but loading it takes longer."""


def wait() -> None:
    """Follow each tracker as soon as it is imported."""
    for module in TRACKERS:
        imports.when_imported(module, _follower(TRACKERS[module]))


def _follower(tracker: str) -> "imports.Call":
    def follow() -> None:
        try:
            from memtrack.autologging import follow_unasked

            follow_unasked(tracker)
        except Exception as exc:
            from memtrack.notices import warn_once

            warn_once(f"autolog {tracker}", f"memtrack does not follow the runs of {tracker} ({exc}).")

    return follow
