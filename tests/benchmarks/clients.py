"""The training loop's side of the three trackers: each is imported, set up and logged to as its users do.

A client is made with the arm and the address of the store; ``own`` is the arm with the tracker's own system metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class MlflowClient:
    """Runs on a server, or in sqlite. Its own metrics are off unless asked for; here with a point a second."""

    def __init__(self, arm: str, address: str) -> None:
        import mlflow

        self._mlflow = mlflow
        self._is_own = arm == "own"
        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("overhead")
        if self._is_own:
            mlflow.set_system_metrics_sampling_interval(1)
            mlflow.set_system_metrics_samples_before_logging(1)

    def start(self) -> str:
        """Start a run; its id."""
        run_id: str = self._mlflow.start_run(log_system_metrics=self._is_own).info.run_id
        return run_id

    def log(self, loss: float, step: int) -> None:
        self._mlflow.log_metric("loss", loss, step=step)

    def end(self) -> None:
        self._mlflow.end_run()


class WandbClient:
    """Offline runs in a folder. Its own metrics are on unless switched off; here with a point a second, not 15 s."""

    def __init__(self, arm: str, address: str) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = None
        self._folder = address
        self._settings = wandb.Settings(
            x_disable_stats=arm != "own",
            x_stats_sampling_interval=1.0,
            console="off",
            disable_git=True,
            disable_job_creation=True,
            silent=True,
        )

    def start(self) -> str:
        """Start a run; its id."""
        self._run = self._wandb.init(project="overhead", mode="offline", dir=self._folder, settings=self._settings)
        run_id: str = self._run.id
        return run_id

    def log(self, loss: float, step: int) -> None:
        self._run.log({"loss": loss}, step=step)

    def end(self) -> None:
        self._run.finish()


class CometClient:
    """Offline experiments in a folder. Its own metrics are on unless switched off; 10 s is their shortest interval."""

    def __init__(self, arm: str, address: str) -> None:
        import comet_ml

        self._comet_ml = comet_ml
        self._experiment: Any = None
        off = ("log_code", "log_env_host", "log_git_metadata", "log_git_patch", "parse_args", "auto_log_co2")
        metrics = ("log_env_cpu", "log_env_gpu", "log_env_network", "log_env_disk")
        options: dict[str, Any] = dict.fromkeys(off, False) | dict.fromkeys(metrics, arm == "own")
        self._config = comet_ml.ExperimentConfig(offline_directory=address, auto_output_logging="", **options)
        Path(address).mkdir(exist_ok=True)

    def start(self) -> str:
        """Start an experiment; its key."""
        self._experiment = self._comet_ml.start(online=False, experiment_config=self._config)
        key: str = self._experiment.get_key()
        return key

    def log(self, loss: float, step: int) -> None:
        self._experiment.log_metric("loss", loss, step=step)

    def end(self) -> None:
        self._experiment.end()


CLIENTS: dict[str, type[MlflowClient] | type[WandbClient] | type[CometClient]] = {
    "mlflow": MlflowClient,
    "wandb": WandbClient,
    "comet": CometClient,
}
