"""A small network learns handwritten digits, logged to MLflow as anybody would; one line adds where the memory goes.

    make demo        or        python examples/demo.py [--seconds 30]

The data, 1,797 real scans of digits, ships with scikit-learn; shifting each of them gives the network 45,000 to learn
from. Everything lands in ``.memtrack/demo``: an MLflow store in sqlite, and a picture of the timeline.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import memtrack

FOLDER = Path(".memtrack/demo").resolve()
SHIFTS = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
BATCH = 256


def shifted(images, shifts):
    """Each image moved by each of the shifts, and twice as large: shape (shifts, images, 256)."""
    large = np.kron(images, np.ones((1, 2, 2)))
    return np.stack([np.roll(large, shift, axis=(1, 2)).reshape(len(images), -1) for shift in shifts])


def load():
    digits = load_digits()
    split = train_test_split(
        digits.images / 16.0, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    train_images, test_images, train_labels, test_labels = split
    x_train = shifted(train_images, SHIFTS).reshape(-1, 256)
    return x_train, np.tile(train_labels, len(SHIFTS)), test_images, test_labels


def evaluate(network, images, labels):
    """Accuracy and loss, each image judged by the mean over its shifts."""
    views = shifted(images, SHIFTS)
    odds = network.predict_proba(views.reshape(-1, 256)).reshape(len(SHIFTS), len(images), -1).mean(axis=0)
    return (odds.argmax(axis=1) == labels).mean(), log_loss(labels, odds)


def train(network, x, y, step, order):
    for first in range(0, len(x), BATCH):
        rows = order[first : first + BATCH]
        network.partial_fit(x[rows], y[rows], classes=range(10))
        memtrack.step(step)
        if step % 20 == 0:
            mlflow.log_metric("loss", network.loss_, step=step)
        step += 1
    return step


def main(seconds):
    FOLDER.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{FOLDER}/mlflow.db")
    monitor = memtrack.autolog()

    mlflow.set_experiment("memtrack demo")
    random = np.random.default_rng(0)
    with mlflow.start_run() as run:
        with memtrack.phase("load"):
            x, y, test_images, test_labels = load()
        network = MLPClassifier((256, 128), random_state=0)
        mlflow.log_params({"layers": "256, 128", "images": len(x), "batch": BATCH})
        step, epoch, end = 0, 0, time.monotonic() + seconds
        while time.monotonic() < end:
            memtrack.epoch(epoch)
            with memtrack.phase("train"):
                step = train(network, x, y, step, random.permutation(len(x)))
            with memtrack.phase("evaluate"):
                accuracy, loss = evaluate(network, test_images, test_labels)
            mlflow.log_metrics({"accuracy": accuracy, "test_loss": loss}, step=step)
            print(f"epoch {epoch}: step {step}, accuracy {accuracy:.3f}, loss {loss:.4f}", flush=True)
            epoch += 1

    print(f"\n{monitor.summary()}\n")
    monitor.stop()
    picture = FOLDER / "timeline.png"
    subprocess.run([sys.executable, "-m", "memtrack", "report", monitor.path, "--png", str(picture)], check=True)
    where = f"http://127.0.0.1:5000/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/system-metrics"
    python = os.path.relpath(sys.executable)
    print(f"picture  {os.path.relpath(picture)}")
    print(f"charts   {python} -m mlflow ui --backend-store-uri sqlite:///{FOLDER}/mlflow.db")
    print(f"         then open {where}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to train, at least (default 30)")
    main(parser.parse_args().seconds)
