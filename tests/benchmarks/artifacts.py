"""What artifacts take when they are stored: memtrack beside zstd, Hugging Face's hf_xet and the trackers themselves.

    python tests/benchmarks/artifacts.py [--items full-fp32,csv,…] [--contestants memtrack,zstd,…] [--corpus FOLDER]

The corpus is made first, see ``corpus``. Each contestant stores each item in a process of its own and restores it in
another one; what comes back is compared byte for byte. Bytes are exact; processor time is of this machine, and noisy
where it has other work. Trackers store files as they are, which is measured with a sequence of checkpoints, one of
tables and the file of 2.1 GB, and taken for granted with the rest, in parentheses. Ten minutes, and 10 GB of disk.

A target that is missed is marked; the exit status is 1 if a byte differs or a contestant fails. Linux only.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BY_PATH = [str(ROOT), str(ROOT / "integrations")]
sys.path += BY_PATH  # at the end: PYTHONPATH, and what is installed, come first

from tests.benchmarks.corpus import BIG, DEFAULT, ITEMS, Item, build, progress  # noqa: E402
from tests.benchmarks.stores import CometStore, MlflowStore, WandbStore  # noqa: E402
from tests.benchmarks.tables import NAMES, render  # noqa: E402
from tests.benchmarks.watched import Failed, Work, size_of, work  # noqa: E402

RATIOS = ("memtrack", "zstd", "xet", *NAMES)
"""Who is compared by what is stored."""
IN_RUNS = tuple(f"memtrack-{tracker}" for tracker in NAMES)
"""memtrack in a tracker's run, with the file of 2.1 GB only."""
MEASURED_WITH_TRACKERS = ("full-bf16", "csv", BIG.name)
TITLES = {"memtrack": "memtrack", "zstd": "zstd -3", "xet": "hf_xet", **NAMES} | {
    f"memtrack-{tracker}": f"memtrack in {name}" for tracker, name in NAMES.items()
}
PACK_MIB, RESTORE_MIB, TRAINING_MIB, MB_PER_CPU_S = 32.0, 16.0, 4.0, 150.0
"""The budgets of the file of 2.1 GB."""


class Outcome(NamedTuple):
    """What a contestant did with an item."""

    raw: int
    stored: int
    """Bytes."""
    storing: Work
    restoring: Work | None
    """None of a tracker's own way: what is offline has no server to ask."""
    differing: list[str]
    """Files that came back as something else."""

    @property
    def ratio(self) -> float:
        return self.raw / self.stored


Outcomes = dict[tuple[str, str], Outcome]
"""By contestant and item."""


class ProxiedStore(MlflowStore):
    """An MLflow server on this machine that takes artifacts by HTTP, as one elsewhere does."""

    artifacts_option = "--artifacts-destination"


# -- one contestant, one item -------------------------------------------------------------------------------------


class Bench:
    """A folder in which contestants work one after the other."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus = corpus
        self._folder = folder
        self._server: ProxiedStore | None = None

    def run(self, contestant: str, item: Item) -> Outcome:
        """Store, restore, compare, clean up."""
        place = self._folder / f"{contestant}-{item.name}"
        for name in ("store", "home", "to"):
            (place / name).mkdir(parents=True)
        tracker = contestant.rpartition("-")[2] if contestant not in ("memtrack", "zstd", "xet") else ""
        environ = self._environ(place)
        address = str(place / "store") if tracker else ""
        if tracker == "mlflow":
            address = self._mlflow()
        command = [
            sys.executable, str(HERE / "contestants.py"), contestant, "store", address, str(place / "store"),
            str(place / "to"), item.name, *(str(self._corpus / file) for file in item.files),
        ]  # fmt: skip
        try:
            kept = self._kept(contestant, place)
            before = kept()
            storing = work(command, environ, place)
            stored = kept() - before
            restoring, differing = None, []
            if contestant not in NAMES:
                command[3] = "restore"
                # another machine: what storing has kept of it for later is not there
                restoring = work(command, self._environ(place, home="elsewhere"), place, storing.receipt)
                differing = self._differing(item, place / "to")
            return Outcome(self._size(item), stored, storing, restoring, differing)
        finally:
            shutil.rmtree(place)

    def _environ(self, place: Path, home: str = "home") -> dict[str, str]:
        prefixes = ("MEMTRACK_", "MLFLOW_", "WANDB_", "COMET_", "HF_")
        return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | {
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *BY_PATH])),
            "HOME": str(place / home),
            "MEMTRACK_DIR": str(place / home / "memtrack"),
            "MLFLOW_TRACKING_URI": self._server.address if self._server is not None else "",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "WANDB_DATA_DIR": str(place / "store" / "data"),
            "DO_NOT_TRACK": "1",
            "GIT_PYTHON_REFRESH": "quiet",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **WandbStore.environ,
            **CometStore.environ,
        }

    def _mlflow(self) -> str:
        if self._server is None:
            folder = self._folder / "mlflow"
            folder.mkdir()
            self._server = ProxiedStore(folder, {**self._environ(folder), "MLFLOW_TRACKING_URI": ""}, "server")
        return self._server.address

    def _kept(self, contestant: str, place: Path) -> Callable[[], int]:
        """Tells the bytes that a contestant has stored."""
        if contestant.endswith("mlflow"):
            return lambda: size_of(self._folder / "mlflow" / "artifacts")
        if contestant == "xet":
            # what goes to the server: neither its index nor the client's copies, which are beside them here
            xorbs = place / "store" / "xet" / "xorbs"
            return lambda: size_of(xorbs / "xorbs") + size_of(xorbs / "shards")
        return lambda: size_of(place / "store")

    def _size(self, item: Item) -> int:
        return sum((self._corpus / file).stat().st_size for file in item.files)

    def _differing(self, item: Item, to: Path) -> list[str]:
        differing = []
        for number, file in enumerate(item.files):
            found = [path for path in (to / str(number)).rglob("*") if path.is_file()]
            if len(found) != 1 or not filecmp.cmp(self._corpus / file, found[0], shallow=False):
                differing.append(file)
        return differing

    def close(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.close()


# -- tables -------------------------------------------------------------------------------------------------------


def verdict(is_kept: bool) -> str:
    return "ok" if is_kept else "MISSED"


def ratio_table(items: list[Item], contestants: list[str], outcomes: Outcomes) -> list[list[str]]:
    """Bytes raw by bytes stored; a target is memtrack's."""
    shown = [name for name in RATIOS if name in contestants]
    table = [["", "MB", *(TITLES[name] for name in shown), "target", ""]]
    for item in items:
        cells = []
        for name in shown:
            found = outcomes.get((name, item.name))
            cells.append(f"{found.ratio:.3f}" if found else "(1.000)" if name in NAMES else "–")
        raw = next((found.raw for (_, of), found in outcomes.items() if of == item.name), None)
        ours = outcomes.get(("memtrack", item.name))
        judged = ["", ""]
        if item.target is not None:
            judged = [f"{item.target:g}", verdict(ours.ratio >= item.target) if ours else ""]
        table.append([item.title, f"{raw / 1e6:.1f}" if raw else "–", *cells, *judged])
    return table


def cost_table(outcomes: Outcomes) -> list[list[str]]:
    """Processor time and memory of every contestant with every item that it stored."""
    table = [["", "by", "store CPU s", "MB/CPU s", "extra MiB", "packer MiB", "restore CPU s", "MB/CPU s", "extra MiB"]]
    for (name, of), found in sorted(outcomes.items(), key=lambda one: list(ITEMS).index(one[0][1])):
        row = [ITEMS[of].title, TITLES[name]]
        for done in (found.storing, found.restoring):
            if done is None:
                row += ["–"] * 3
                continue
            row += [f"{done.cpu_s:.2f}", f"{speed(found, done):.0f}", f"{done.extra_mib:.1f}"]
            if done is found.storing:
                row.append("–" if done.packer_mib is None else f"{done.packer_mib:.1f}")
        table.append(row)
    return table


def speed(found: Outcome, done: Work) -> float:
    """MB of the item per second on a processor."""
    return found.raw / 1e6 / max(done.cpu_s, 0.01)


def budget_table(outcomes: Outcomes) -> list[list[str]]:
    """What memtrack may take with the file of 2.1 GB."""
    table = [["", "memtrack", "unit", "budget", ""]]
    for name in ("memtrack", *IN_RUNS):
        found = outcomes.get((name, BIG.name))
        if found is None:
            continue
        where = TITLES[name].removeprefix("memtrack in ").replace("memtrack", "a folder")
        lines = [(f"training process, to {where}", found.storing.extra_mib, "MiB", TRAINING_MIB)]
        if found.storing.packer_mib is not None:
            lines.append((f"process that packs, to {where}", found.storing.packer_mib, "MiB", PACK_MIB))
        if found.restoring is not None:
            lines.append((f"restoring from {where}", found.restoring.extra_mib, "MiB", RESTORE_MIB))
        table += [
            [what, f"{value:.1f}", unit, f"{most:g}", verdict(value <= most)] for what, value, unit, most in lines
        ]
    found = outcomes.get(("memtrack", BIG.name))
    if found is not None:
        for what, done in (("storing", found.storing), ("restoring", found.restoring)):
            if done is not None:
                value = speed(found, done)
                table.append([what, f"{value:.0f}", "MB/CPU s", f"{MB_PER_CPU_S:g}", verdict(value >= MB_PER_CPU_S)])
    return table


def machine() -> str:
    """Where this was measured."""
    names = ("mlflow", "wandb", "comet_ml", "hf_xet", "zstandard", "numpy")
    return (
        f"{os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}, "
        f"{platform.python_implementation()} {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
    )


# -- the whole ----------------------------------------------------------------------------------------------------


def wanted(contestants: list[str], items: list[Item]) -> list[tuple[str, Item]]:
    """Who stores what."""
    return [
        (name, item)
        for item in items
        for name in contestants
        if (name not in NAMES or item.name in MEASURED_WITH_TRACKERS) and (name not in IN_RUNS or item is BIG)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    everyone, everything = [*RATIOS, *IN_RUNS], list(ITEMS)
    parser.add_argument("--corpus", type=Path, default=DEFAULT, metavar="FOLDER", help="where it is (%(default)s)")
    parser.add_argument("--items", type=lambda text: text.split(","), default=everything, help=", ".join(everything))
    parser.add_argument("--contestants", type=lambda text: text.split(","), default=everyone, help=", ".join(everyone))
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    arguments = parser.parse_args()
    if unknown := {*arguments.items} - {*everything} | {*arguments.contestants} - {*everyone}:
        parser.error(f"no such item or contestant: {', '.join(sorted(unknown))}")
    corpus = arguments.corpus.resolve()
    build(corpus)

    items = [ITEMS[name] for name in arguments.items]
    outcomes: Outcomes = {}
    failed: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="memtrack-bench-", dir=corpus))
    bench = Bench(corpus, folder)
    try:
        for name, item in wanted(arguments.contestants, items):
            try:
                found = outcomes[name, item.name] = bench.run(name, item)
            except Failed as exc:
                failed.append(f"{TITLES[name]}, {item.title}")
                progress(f"{failed[-1]} FAILED:\n{exc}")
                continue
            progress(f"{TITLES[name]}, {item.title}: {found.ratio:.3f}, {found.storing.cpu_s:.1f} CPU s")
    finally:
        bench.close()
        shutil.rmtree(folder, ignore_errors=True)

    print("\nBytes by bytes stored\n")
    print(render(ratio_table(items, arguments.contestants, outcomes), True))
    print("\nCosts\n")
    print(render(cost_table(outcomes), True))
    if any(name.startswith("memtrack") and of == BIG.name for name, of in outcomes):
        print(f"\nBudgets, {BIG.title}\n")
        print(render(budget_table(outcomes), True))
    print(f"\n{machine()}")
    if arguments.json:
        figures = {f"{name} {of}": found._asdict() for (name, of), found in outcomes.items()}
        Path(arguments.json).write_text(json.dumps(figures, default=lambda one: one._asdict(), indent=1) + "\n")
    differing = [f"{TITLES[name]}: {file}" for (name, _), found in outcomes.items() for file in found.differing]
    for line in differing:
        print(f"DIFFERS after it was restored: {line}")
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if differing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
