"""Checkpoints that are stored as differences to each other, and restored byte for byte.

`memtrack.log_checkpoint` returns at once; a process beside the training packs, and what it makes goes to the run.
Needs `pip install 'memtrack[artifacts,torch,mlflow]' scikit-learn`.
"""

import mlflow
import torch
from sklearn.datasets import load_digits

import memtrack


def main():
    images, labels = load_digits(return_X_y=True)
    pixels, digits = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    with mlflow.start_run():
        for step in range(100):
            loss = torch.nn.functional.cross_entropy(model(pixels), digits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 19:
                # or a path: what torch has saved, safetensors, a folder
                upload = memtrack.log_checkpoint(model.state_dict(), step=step, name="model")
                upload.wait()  # only to print what came of it
                print(upload)
        mlflow.log_metric("loss", loss.item())
    path = memtrack.restore(upload.source, to="restored")
    restored = torch.load(path, weights_only=True)
    same = all(torch.equal(restored[name], value) for name, value in model.state_dict().items())
    print(f"{path} is {'the same' if same else 'another'}; from the shell: memtrack restore {upload.source}")


if __name__ == "__main__":
    main()
