"""Keras on any of its backends: the memory peak of each epoch beside its loss, wherever Keras logs that."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow": before Keras is imported

import keras
from memtrack_keras import MemoryCallback
from sklearn.datasets import load_digits

import memtrack


def main():
    with memtrack.start(interval="200ms") as monitor:
        with memtrack.phase("load"):
            digits = load_digits()
            images = digits.images.astype("float32") / 16
        model = keras.Sequential(
            [
                keras.Input((8, 8)),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        history = model.fit(
            images,
            digits.target,
            batch_size=64,
            epochs=3,
            validation_split=0.2,
            verbose=2,
            callbacks=[
                MemoryCallback(),  # the first: those behind it have the peak in their logs
                keras.callbacks.CSVLogger("log.csv"),
                keras.callbacks.ModelCheckpoint("digits.weights.h5", save_weights_only=True),
            ],
        ).history
    for epoch, peak_mib in enumerate(history["memory/epoch/rss_peak_mib"]):
        print(f"epoch {epoch}: accuracy {history['accuracy'][epoch]:.2f}, peak {peak_mib:.1f} MiB")
    print(monitor.summary())


if __name__ == "__main__":
    main()
