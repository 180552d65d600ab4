"""Coverage-guided fuzzing of all that reads recordings: ``make fuzz``. The arguments are libFuzzer's."""

from __future__ import annotations

import sys
import tempfile

import atheris

PACKAGES = ["memtrack.recording", "memtrack.analysis", "memtrack.report", "memtrack.sampling", "memtrack.sinks"]

with atheris.instrument_imports(include=PACKAGES):
    import memtrack.report.terminal  # noqa: F401 - what is imported later is not watched
    from tests.fuzz.splice import Canvas


def main() -> None:
    """Fuzz until libFuzzer has had enough."""
    folder = tempfile.TemporaryDirectory(prefix="memtrack-fuzz-")
    canvas = Canvas(folder.name)
    atheris.Setup(sys.argv, lambda data: canvas.try_input(data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
