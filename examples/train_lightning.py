"""Lightning: one line, and the log of the training has the peak memory of its steps beside the loss.

With pytorch_lightning it is the same line.
"""

import csv

import memtrack

memtrack.autolog(interval="200ms")

import lightning.pytorch as lightning  # noqa: E402 - before or after autolog(), it does not matter
import torch  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


class Digits(lightning.LightningModule):
    """Tells handwritten digits apart."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))

    def training_step(self, batch, number):
        loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, number):
        self.log("accuracy", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.005)


def main():
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, check = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", logger=CSVLogger("logs"), log_every_n_steps=10, enable_progress_bar=False
    )
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(check, 512))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.2f}")
    with open(trainer.logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    for row in rows[-3:]:
        print(f"step {row['step']}: loss {float(row['loss']):.3f}, peak {row['memory/step/rss_peak_mib']} MiB")
    print(memtrack.autolog().summary())


if __name__ == "__main__":
    main()
