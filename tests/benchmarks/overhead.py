"""What monitoring costs: the same training loop without it, with memtrack, and with the trackers' own metrics.

    python tests/benchmarks/overhead.py [--trackers mlflow,wandb,comet] [--rounds N] [--quick] [--markdown]

For each tracker each arm runs in a fresh process, in turn (A B C A B C ...), and is compared with the plain arm of the
same round; the medians of the rounds are shown. MLflow's runs go to a server on this machine, those of W&B and Comet
are offline. Below that stand the costs of single calls, and what selective logging leaves out. Memory is exact; times
are those of this machine, and noisy where it has other work: compare ratios.

A round takes three to four minutes a tracker, all else two; --quick is one short round. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PREFIXES = ("MEMTRACK_", "MLFLOW_", "WANDB_", "COMET_")
BY_PATH = [str(ROOT), str(ROOT / "integrations")]
sys.path += BY_PATH  # at the end: PYTHONPATH, and what is installed, come first

from memtrack.recording.reader import RecordingReader  # noqa: E402
from tests.benchmarks import selective  # noqa: E402
from tests.benchmarks.arms import Figures, Loop  # noqa: E402
from tests.benchmarks.readings import cpu, memory  # noqa: E402
from tests.benchmarks.stores import STORES, Store  # noqa: E402
from tests.benchmarks.tables import NAMES, TITLES, loop_table, micro_table, render  # noqa: E402
from tests.benchmarks.training_loop import ARMS  # noqa: E402


def progress(text: str) -> None:
    """Tell the user what is going on, apart from the result."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# -- single costs -------------------------------------------------------------------------------------------------


def micro(what: str, environ: dict[str, str], times: int = 3) -> Figures:
    """The least of several fresh processes: what other work on the machine adds is not memtrack's."""
    runs = []
    for _ in range(times):
        command = [sys.executable, str(HERE / "micro.py"), what]
        runs.append(json.loads(subprocess.run(command, env=environ, check=True, capture_output=True).stdout))
    return {key: min(run[key] for run in runs) for key in runs[0]}


def agent_alone(environ: dict[str, str], seconds: float) -> Figures:
    """The agent beside a process that rests, trains, and trains in phases, without any tracker."""
    command = [sys.executable, str(HERE / "micro.py"), "host"]
    with subprocess.Popen(command, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with RecordingReader(child.stdout.readline().strip()) as reader:
            figures: Figures = {}
            time.sleep(2.0)
            agent = reader.head().agent_pid
            for name in ("calm", "busy", "phases"):
                before, ticks, began = cpu(agent), reader.head().ticks, time.monotonic()
                child.stdin.write(f"{name} {seconds}\n")
                child.stdin.flush()
                child.stdout.readline()
                took = time.monotonic() - began
                figures[f"{name}_cpu_pct"] = 100 * (cpu(agent) - before) / took
                figures[f"{name}_ticks_per_s"] = (reader.head().ticks - ticks) / took
                found = memory(agent)
                figures[f"{name}_rss_mib"], figures[f"{name}_pss_mib"] = found.rss, found.pss
                figures[f"{name}_uss_mib"] = found.uss
        child.stdin.close()
    return figures


# -- the whole ----------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Touch what a run will need: on a virtual machine the first touch of a page takes ten times as long."""
    code = "import mmap; held = mmap.mmap(-1, 1 << 30); held.write(bytes(1 << 30))"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def machine() -> str:
    """Where this was measured."""
    with open("/proc/meminfo", encoding="ascii") as file:
        total_gib = int(file.readline().split()[1]) / (1 << 20)
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlflow", "wandb", "comet_ml", "numpy"))
    return (
        f"{os.cpu_count()} cores, {total_gib:.0f} GiB, Linux {platform.release().partition('-')[0]}, "
        f"{platform.python_implementation()} {platform.python_version()}, {versions}"
    )


def busy_share(since: tuple[float, float]) -> float:
    """How busy the machine's processors were since, in percent, whoever used them."""
    total, rest = _processor_ticks()
    return 100 * (1 - (rest - since[1]) / max(total - since[0], 1.0))


def _processor_ticks() -> tuple[float, float]:
    with open("/proc/stat", encoding="ascii") as file:
        fields = [float(field) for field in file.readline().split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def measure_rounds(
    arguments: argparse.Namespace, folder: Path, environ: dict[str, str]
) -> list[dict[str, dict[str, Figures]]]:
    """Every arm of every tracker in turn, as often as there are rounds: tracker -> arm -> figures, for each round."""
    rounds: list[dict[str, dict[str, Figures]]] = []
    stores: dict[str, Store] = {}
    try:
        for tracker in arguments.trackers:
            progress(f"{NAMES[tracker]}: setting up and warming up ...")
            stores[tracker] = STORES[tracker](folder, environ, arguments.store)
            # the first run finds a cold server and uncompiled modules; it does not count
            arm = "memtrack" if "memtrack" in arguments.arms else arguments.arms[0]
            Loop(tracker, arm, stores[tracker], True, environ).run()
        for number in range(arguments.rounds):
            rounds.append({})
            for tracker, store in stores.items():
                measured = rounds[-1][tracker] = {}
                for arm in arguments.arms:
                    measured[arm] = measure_arm(tracker, arm, store, arguments.quick, environ, measured.get("plain"))
                progress(f"round {number + 1} of {arguments.rounds}: {NAMES[tracker]} done")
    finally:
        for store in stores.values():
            store.close()
    return rounds


def measure_arm(
    tracker: str, arm: str, store: Store, is_quick: bool, environ: dict[str, str], plain: Figures | None
) -> Figures:
    """The figures of one run of the training loop; ``plain`` are those of the tracker alone."""
    warm_up()
    since = _processor_ticks()
    found = Loop(tracker, arm, store, is_quick, environ).run()
    parts = ("agent_cpu_pct", "threads_cpu_pct", "tracker_cpu_pct")
    base = found if arm == "plain" else plain or {}
    found["monitor_cpu_pct"] = sum(found[part] - base.get(part, 0.0) for part in parts)
    progress(
        f"  {TITLES[arm].format(NAMES[tracker])}: trained {found['train_s']:.1f} s, "
        f"USS {found['uss_mib']:.1f} MiB, machine {busy_share(since):.0f} % busy"
    )
    return found


def measure_micro(arguments: argparse.Namespace, environ: dict[str, str]) -> Figures:
    """Every single cost."""
    figures: Figures = {}
    for what in ("calls", "idle", "import", "start"):
        progress(f"single costs: {what} ...")
        figures |= micro(what, environ)
    seconds = 10.0 if arguments.quick else 30.0
    progress(f"the agent beside a process at rest and one that trains, {3 * seconds:.0f} s ...")
    return figures | agent_alone(environ, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short runs, one round: to see that it works")
    parser.add_argument("--rounds", type=int, help="how often each arm runs (3)")
    parser.add_argument(
        "--trackers", type=lambda text: text.split(","), default=list(STORES), help=f"of {','.join(STORES)}"
    )
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help=f"of {','.join(ARMS)}")
    parser.add_argument(
        "--store", choices=("server", "sqlite"), default="server", help="where MLflow's runs go (server)"
    )
    parser.add_argument("--only", choices=("loop", "micro"), help="leave the rest out")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    if unknown := set(arguments.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}")
    if unknown := set(arguments.trackers) - set(STORES):
        parser.error(f"no such tracker: {', '.join(sorted(unknown))}")

    folder = Path(tempfile.mkdtemp(prefix="memtrack-bench-"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)} | {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *BY_PATH])),
        "PYTHONHASHSEED": "0",
        "MEMTRACK_DIR": str(folder / "recordings"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "1",
        "GIT_PYTHON_REFRESH": "quiet",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # so that the server and the loop are not left behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    since = _processor_ticks()
    try:
        rounds = measure_rounds(arguments, folder, environ) if arguments.only != "micro" else []
        single = measure_micro(arguments, environ) if arguments.only != "loop" else {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    where = machine()
    report(arguments, rounds, single)
    print(f"\n{where}; {arguments.rounds} rounds; processors {busy_share(since):.0f} % busy meanwhile.")
    if arguments.json:
        everything = {"machine": where, "store": arguments.store, "rounds": rounds, "single": single}
        Path(arguments.json).write_text(json.dumps(everything, indent=1) + "\n")


def report(arguments: argparse.Namespace, rounds: list[dict[str, dict[str, Figures]]], single: Figures) -> None:
    """The tables."""
    places = {"mlflow": "an MLflow server on this machine" if arguments.store == "server" else "MLflow with sqlite"}
    for tracker in arguments.trackers if rounds else ():
        print(f"\nA training loop that logs to {places.get(tracker, f'{NAMES[tracker]}, offline')}\n")
        table = loop_table(tracker, [one[tracker] for one in rounds], arguments.arms)
        print(render(table, arguments.markdown))
    if single:
        print("\nSingle costs\n")
        print(render(micro_table(single), arguments.markdown))
    if arguments.only is None:
        print("\nSelective logging, against every window sent\n")
        print(selective.table(arguments.markdown))


if __name__ == "__main__":
    main()
