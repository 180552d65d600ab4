"""A loop with Hugging Face's accelerate: memtrack_accelerate.watch() adds the memory peak to each row that it logs."""

import os

import mlflow
import torch
from accelerate import Accelerator
from memtrack_accelerate import watch
from sklearn.datasets import load_digits

import memtrack


def main():
    os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    accelerator = watch(Accelerator(log_with="mlflow"), interval="200ms")
    accelerator.init_trackers("digits")

    with memtrack.phase("load"):
        digits = load_digits()
        pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        batches = torch.utils.data.DataLoader(list(zip(pixels, labels, strict=True)), batch_size=64, shuffle=True)

    net = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    net, optimizer, batches = accelerator.prepare(net, torch.optim.Adam(net.parameters(), 1e-3), batches)

    step = 0
    for epoch in range(4):
        memtrack.epoch(epoch)
        with memtrack.phase("train"):
            for images, targets in batches:
                loss = torch.nn.functional.cross_entropy(net(images), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                accelerator.log({"loss": loss.item()}, step=step)
        accelerator.save_state(f"checkpoints/{epoch}")

    run = accelerator.get_tracker("mlflow", unwrap=True)
    accelerator.end_training()
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    print(f"step {step}: loss {metrics['loss']:.2f}, peak {metrics['memory/step/rss_peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
