"""The shortest way: one line, and each MLflow run of the program has its memory charts."""

import os

import memtrack

memtrack.autolog(interval="200ms")

import mlflow  # noqa: E402 - before or after autolog(), it does not matter


def main():
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
    for size_mib in (50, 100):
        with mlflow.start_run(run_name=f"{size_mib} MiB") as run:
            for step in range(30):
                memtrack.step(step)
                block = b"x" * (size_mib << 20)
                mlflow.log_metric("loss", 1 / (1 + step), step=step)
                del block
        tags = mlflow.get_run(run.info.run_id).data.tags
        print(f"{run.info.run_name}: peak {tags['memtrack.peak']} at step {tags['memtrack.peak_step']}")


if __name__ == "__main__":
    main()
