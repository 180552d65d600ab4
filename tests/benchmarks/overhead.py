"""What monitoring costs: the same training loop without it, with memtrack, and with MLflow's own system metrics.

    python tests/benchmarks/overhead.py [--quick] [--markdown] [--json FILE]

Each arm runs in a fresh process against one MLflow server on this machine, in turn (A B C A B C ...), and is compared
with the plain arm of the same round; the medians of the rounds are shown. Below that stand the costs of single calls.
Memory is exact; times are those of this machine, and noisy where it has other work: compare ratios.

The whole takes some fifteen minutes, with --quick three. Linux only.
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
BY_PATH = [str(ROOT), str(ROOT / "integrations")]
sys.path += BY_PATH  # at the end: PYTHONPATH, and what is installed, come first

from memtrack.recording.reader import RecordingReader  # noqa: E402
from tests.benchmarks.arms import Figures, Loop, Store  # noqa: E402
from tests.benchmarks.readings import cpu, memory  # noqa: E402
from tests.benchmarks.tables import TITLES, loop_table, micro_table, render  # noqa: E402
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
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlflow", "numpy"))
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


def measure_rounds(arguments: argparse.Namespace, folder: Path, environ: dict[str, str]) -> list[dict[str, Figures]]:
    """Every arm in turn, as often as there are rounds."""
    rounds: list[dict[str, Figures]] = []
    progress("setting up the tracking store ...")
    store = Store(arguments.store, folder, environ)
    try:
        # the first run finds a cold server and uncompiled modules; it does not count
        progress("warming up ...")
        Loop("memtrack" if "memtrack" in arguments.arms else arguments.arms[0], store, True, environ).run()
        for number in range(arguments.rounds):
            rounds.append({})
            for arm in arguments.arms:
                warm_up()
                since = _processor_ticks()
                found = rounds[-1][arm] = Loop(arm, store, arguments.quick, environ).run()
                found["monitor_cpu_pct"] = found["agent_cpu_pct"] + found["threads_cpu_pct"]
                if "plain" in rounds[-1]:
                    found["monitor_cpu_pct"] -= rounds[-1]["plain"]["threads_cpu_pct"]
                progress(
                    f"round {number + 1} of {arguments.rounds}, {TITLES[arm]}: trained {found['train_s']:.1f} s, "
                    f"USS {found['uss_mib']:.1f} MiB, machine {busy_share(since):.0f} % busy"
                )
    finally:
        store.close()
    return rounds


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
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help=f"of {','.join(ARMS)}")
    parser.add_argument(
        "--store", choices=("server", "sqlite"), default="server", help="where MLflow's runs go (server)"
    )
    parser.add_argument("--only", choices=("loop", "micro"), help="leave the other half out")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    parser.add_argument("--json", metavar="FILE", help="write every figure of every round")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    if unknown := set(arguments.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}")

    folder = Path(tempfile.mkdtemp(prefix="memtrack-bench-"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MEMTRACK_", "MLFLOW_"))} | {
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


def report(arguments: argparse.Namespace, rounds: list[dict[str, Figures]], single: Figures) -> None:
    """The tables."""
    if rounds:
        where_to = "an MLflow server on this machine" if arguments.store == "server" else "MLflow with sqlite"
        print(f"\nA training loop that logs to {where_to}, one point a second\n")
        print(render(loop_table(rounds, arguments.arms), arguments.markdown))
    if single:
        print("\nSingle costs\n")
        print(render(micro_table(single), arguments.markdown))


if __name__ == "__main__":
    main()
