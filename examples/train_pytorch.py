"""A plain PyTorch loop with two loader workers: ``watch`` joins the memory to epochs, steps and phases.

The peak of each epoch stands beside its loss in the run. With `memtrack.autolog()` alone, and the loop as it was, there
are charts and steps as well. Needs `pip install 'memtrack[torch,mlflow]' scikit-learn`.
"""

import mlflow
import torch
from memtrack_pytorch import watch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


def main():
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters())

    batches = watch(DataLoader(train, batch_size=50, shuffle=True, num_workers=2), interval=0.2)
    checks = watch(DataLoader(test, batch_size=297), phase="validation")
    with mlflow.start_run() as run:
        for epoch in range(3):
            for pixels, digits in batches:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(pixels), digits)
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                right = sum(int((model(pixels).argmax(1) == digits).sum()) for pixels, digits in checks)
            row = {"loss": loss.item(), "accuracy": right / len(test), **batches.row()}
            mlflow.log_metrics(row, step=epoch)
            print(", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    print(f"{batches.step + 1} steps; see run {run.info.run_id} in the MLflow UI")


if __name__ == "__main__":
    main()
