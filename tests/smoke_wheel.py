"""The wheel alone, in an environment without any extra: `python -I tests/smoke_wheel.py`.

A script and not a test module: pytest is one of the packages that must be absent. What needs no extra has to work, and
what needs one has to fail with a single message that ends with the command to run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

OPTIONAL = ("matplotlib", "mlflow", "numpy", "pandas", "psutil", "pyarrow", "rich", "typer")


def check(what: str, ok: object, detail: object = "") -> None:
    if not ok:
        sys.exit(f"smoke test failed: {what}\n{detail}")
    print(f"  ok: {what}")


def check_missing(what: str, extra: str, call: Callable[[], object]) -> None:
    from memtrack.errors import MissingDependencyError

    command = f"pip install 'memtrack[{extra}]'"
    try:
        call()
    except MissingDependencyError as error:
        check(f"{what} says: {command}", command in str(error) and "\n" not in str(error), error)
    else:
        check(f"{what} needs the extra {extra}", False, "it did not fail")


def main() -> None:
    present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    check("no optional package is installed", not present, present)

    import memtrack

    check("memtrack comes from site-packages", "site-packages" in memtrack.__file__, memtrack.__file__)
    check("the version is the wheel's", memtrack.__version__ == importlib.metadata.version("memtrack"))
    files = {str(path) for path in importlib.metadata.files("memtrack") or ()}
    check("type information is shipped", {"memtrack/py.typed", "memtrack_mlflow/py.typed"} <= files)
    stray = {path.split("/")[0] for path in files if not path.startswith(("memtrack", ".."))}
    check("nothing else is shipped", not stray, stray)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEMTRACK_DIR"] = folder
        path = record(Path(folder))
        recording = memtrack.open_recording(str(path))
        check("the recording has windows", len(list(recording.windows())) > 0)
        check_missing("to_pandas()", "data", recording.to_pandas)
        check_missing("start(sinks=['mlflow'])", "mlflow", lambda: memtrack.start(sinks=["mlflow"]))
        check_command_line()


def record(folder: Path) -> Path:
    """Record two seconds of a loop that allocates."""
    import memtrack

    with memtrack.start(interval=0.2) as monitor:
        kept = []
        for step in range(20):
            memtrack.step(step)
            with memtrack.phase("allocate"):
                kept.append(bytearray(1 << 20))
            time.sleep(0.1)
    summary = str(monitor.summary())
    print(summary)
    check("the summary names a peak", "peak" in summary.lower(), summary)
    recordings = list(folder.rglob("*.mtk"))
    check("there is one recording", len(recordings) == 1, recordings)
    return recordings[0]


def check_command_line() -> None:
    for command in ([str(Path(sys.executable).with_name("memtrack"))], [sys.executable, "-I", "-m", "memtrack"]):
        done = subprocess.run([*command, "ls"], capture_output=True, text=True, timeout=60)
        said = done.stdout + done.stderr
        what = " ".join(Path(part).name for part in command)
        check(f"`{what}` fails", done.returncode != 0, said)
        check(f"`{what}` says how to go on", said.count("pip install 'memtrack[cli]'") == 1, said)
        check(f"`{what}` shows no traceback", "Traceback" not in said, said)


if __name__ == "__main__":
    main()
