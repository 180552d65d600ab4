"""Coverage-guided fuzzing of all that reads artifacts: ``make fuzz``. The arguments are libFuzzer's."""

from __future__ import annotations

import sys

import atheris

PACKAGES = ["memtrack.artifacts"]

with atheris.instrument_imports(include=PACKAGES):
    from tests.fuzz.crate import Crate


def main() -> None:
    """Fuzz until libFuzzer has had enough."""
    crate = Crate()
    atheris.Setup(sys.argv, crate.try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
