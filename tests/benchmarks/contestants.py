"""Who stores artifacts, each as its users do, in a process of its own that ``watched`` starts and reads.

    python tests/benchmarks/contestants.py CONTESTANT store|restore ADDRESS FOLDER TO ITEM FILE...

Everything is imported, and the tracker's run has begun, before it says READY; then the peak of its memory is forgotten,
and once it is told so it stores the files one after the other, or restores them, file N into the folder TO/N.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.clients import CLIENTS
from tests.benchmarks.corpus import ITEMS

READS_WITH = {"mlflow": ("mlflow",), "wandb": ("wandb.proto.wandb_internal_pb2",)}
"""What of a tracker is imported to restore from it."""


class Task(NamedTuple):
    """What a contestant is asked for."""

    address: str
    """Of the tracker's store, "" if the contestant has none."""
    folder: Path
    """Where it may keep what it stores."""
    to: Path
    """Where restored files go."""
    item: str
    files: tuple[str, ...]

    def place(self, number: int) -> Path:
        """Where a restored file goes."""
        place = self.to / str(number)
        place.mkdir(parents=True)
        return place


class Memtrack:
    """``log_checkpoint`` and ``log_artifact`` into a folder, or with a tracker's run."""

    def __init__(self, task: Task, verb: str, tracker: str = "") -> None:
        import numpy  # noqa: F401 - no training does without

        import memtrack

        self._memtrack: Any = memtrack
        self._tracker = tracker
        self._client: Any = None
        self._root = str(task.folder)
        if verb == "restore":
            for needed in ("zstandard", *READS_WITH.get(tracker, ())):
                import_module(needed)
        elif tracker:
            self._client = CLIENTS[tracker]("plain", task.address)
            run_id = self._client.start()
            self._client.log(0.0, 0)
            self._root = getattr(self, f"_{tracker}")(run_id)

    def store(self, task: Task) -> str:
        to = None if self._tracker else str(task.folder)
        names = []
        for path in task.files:
            name = Path(path).name
            if ITEMS[task.item].is_checkpoint:
                step = int(Path(path).stem.partition("-")[2])
                self._memtrack.log_checkpoint(path, step=step, name="model", to=to).wait()
                name = f"model/step-{step:08d}"
            else:
                self._memtrack.log_artifact(path, name=name, to=to).wait()
            names.append(name)
        return json.dumps([self._root, names])

    def restore(self, task: Task, receipt: str) -> None:
        root, names = json.loads(receipt)
        if self._tracker == "comet":  # the end of the name is known when the run has ended
            (archive,) = task.folder.glob(root)
            root = f"comet:{archive}"
        for number, name in enumerate(names):
            self._memtrack.restore(f"{root}/{name}", to=str(task.place(number)))

    def close(self) -> None:
        if self._client is not None:
            self._client.end()

    def _mlflow(self, run_id: str) -> str:
        return f"mlflow:{run_id}"

    def _wandb(self, run_id: str) -> str:
        import wandb

        assert wandb.run is not None
        return f"wandb:{Path(wandb.run.dir).parent}"

    def _comet(self, run_id: str) -> str:
        return f"{run_id}*.zip"


class Zstd:
    """Each file by itself, at level 3."""

    def __init__(self, task: Task, verb: str) -> None:
        import zstandard

        self._zstandard = zstandard

    def store(self, task: Task) -> str:
        for number, path in enumerate(task.files):
            self._copy(self._zstandard.ZstdCompressor(level=3), path, task.folder / f"{number}.zst")
        return ""

    def restore(self, task: Task, receipt: str) -> None:
        for number in range(len(task.files)):
            self._copy(self._zstandard.ZstdDecompressor(), task.folder / f"{number}.zst", task.place(number) / "file")

    def close(self) -> None:
        pass

    def _copy(self, by: Any, come: str | Path, go: Path) -> None:
        with open(come, "rb") as source, open(go, "wb") as target:
            by.copy_stream(source, target)


class Xet:
    """Hugging Face's client with a store on this machine; a commit a file, as a training would."""

    def __init__(self, task: Task, verb: str) -> None:
        import hf_xet

        self._hf_xet = hf_xet
        self._endpoint = f"local://{task.folder}"

    def store(self, task: Task) -> str:
        session = self._hf_xet.XetSession()
        found = []
        for path in task.files:
            with session.new_upload_commit(endpoint=self._endpoint) as commit:
                upload = commit.start_upload_file(path)
            info = upload.result().xet_info
            found.append((info.hash, info.file_size))
        return json.dumps(found)

    def restore(self, task: Task, receipt: str) -> None:
        session = self._hf_xet.XetSession()
        for number, (key, size) in enumerate(json.loads(receipt)):
            with session.new_file_download_group(endpoint=self._endpoint) as group:
                group.start_download_file(self._hf_xet.XetFileInfo(key, size), str(task.place(number) / "file"))

    def close(self) -> None:
        pass


class Tracker:
    """A tracker's own way, to the end of the run: Comet writes its archive only then."""

    def __init__(self, task: Task, verb: str, tracker: str) -> None:
        self._tracker = tracker
        self._client = CLIENTS[tracker]("plain", task.address)
        self._client.start()
        self._client.log(0.0, 0)

    def store(self, task: Task) -> str:
        for number, path in enumerate(task.files):
            getattr(self, f"_{self._tracker}")(path, number)
        self._client.end()
        return ""

    def close(self) -> None:
        pass

    def _mlflow(self, path: str, number: int) -> None:
        import mlflow

        mlflow.log_artifact(path, f"version-{number}")

    def _wandb(self, path: str, number: int) -> None:
        import wandb

        assert wandb.run is not None
        artifact = wandb.Artifact("files", type="files")
        artifact.add_file(path)
        wandb.run.log_artifact(artifact)

    def _comet(self, path: str, number: int) -> None:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        assert experiment is not None
        experiment.log_asset(path, file_name=f"version-{number}")


def contestant(name: str, task: Task, verb: str) -> Any:
    """The one of that name: "memtrack", "memtrack-mlflow", "zstd", "xet", "mlflow" …"""
    first, _, tracker = name.partition("-")
    if first == "memtrack":
        return Memtrack(task, verb, tracker)
    return {"zstd": Zstd, "xet": Xet}[name](task, verb) if name in ("zstd", "xet") else Tracker(task, verb, name)


def main() -> None:
    # what trackers print goes elsewhere
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, verb, address, folder, to, item, *files = sys.argv[1:]
    task = Task(address, Path(folder), Path(to), item, tuple(files))
    one = contestant(name, task, verb)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    print("READY", file=said, flush=True)
    receipt = sys.stdin.readline()
    print(f"DONE {one.store(task) if verb == 'store' else one.restore(task, receipt)}", file=said, flush=True)
    sys.stdin.readline()
    one.close()


if __name__ == "__main__":
    main()
