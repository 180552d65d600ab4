"""Autolog in every Python below ``memtrack run``. Loads nothing more until a tracker or framework is imported, starts
nothing until one of its runs or trainings does."""

from memtrack import imports

FOLLOWED = {
    "comet_ml": "comet",
    "keras": "keras",
    "lightning.pytorch": "lightning",
    "mlflow": "mlflow",
    "pytorch_lightning": "pytorch_lightning",
    "torch.optim.optimizer": "torch",
    "transformers.trainer": "transformers",
    "wandb": "wandb",
}
"""What the modules are followed as; ``memtrack.registry`` knows the same, but loading it takes longer."""


def wait() -> None:
    """Follow each tracker and framework as soon as it is imported."""
    for module in FOLLOWED:
        imports.when_imported(module, _follower(FOLLOWED[module]))


def _follower(name: str) -> "imports.Call":
    def follow() -> None:
        try:
            from memtrack.autologging import follow_unasked

            follow_unasked(name)
        except Exception as exc:
            from memtrack.notices import warn_once

            warn_once(f"autolog {name}", f"memtrack does not follow {name} ({exc}).")

    return follow
