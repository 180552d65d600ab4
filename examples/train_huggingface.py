"""Hugging Face's Trainer: with memtrack.autolog() each row of its log has the memory peak of its steps."""

import os

import memtrack

memtrack.autolog(interval="200ms")

import torch  # noqa: E402 - before or after autolog(), it does not matter
from sklearn.datasets import load_digits  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))

    def forward(self, pixels, labels):
        logits = self.layers(pixels)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def main():
    os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    data = [{"pixels": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    arguments = TrainingArguments(
        "checkpoints",
        per_device_train_batch_size=64,
        num_train_epochs=4,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="epoch",
        report_to=["mlflow"],
        disable_tqdm=True,
    )
    # without autolog it would be callbacks=[memtrack_huggingface.MemoryCallback()]
    trainer = Trainer(Net(), arguments, train_dataset=data[:1500], eval_dataset=data[1500:])
    trainer.train()
    print(f"evaluation: {trainer.evaluate()['eval_loss']:.2f}")
    for row in trainer.state.log_history:
        if "loss" in row:
            print(f"step {row['step']}: loss {row['loss']:.2f}, peak {row['memory/step/rss_peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
