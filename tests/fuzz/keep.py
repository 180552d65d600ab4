"""Choose what of a fuzzing run is worth keeping: ``python -m tests.fuzz.keep corpus test-artifacts/fuzz/tried``.

The first is the folder here that is rewritten: ``corpus`` of recordings, ``artifacts`` of artifacts.

Of the corpus and the inputs in the folders, the smallest are kept that together take every way from one line to the
next that all of them take. (libFuzzer's own ``-merge`` starts itself again, which a Python program is not made for.)
"""

from __future__ import annotations

import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.crate import Crate
from tests.fuzz.splice import ROOT, Canvas

if TYPE_CHECKING:
    from types import CodeType, FrameType

MAX_FILES, MAX_BYTES = 200, 500 << 10

Step = tuple["CodeType", int, int]


class Tracer:
    """Collects the steps from line to line in memtrack's own code."""

    def __init__(self) -> None:
        self.steps: set[Step] = set()
        self._last: dict[int, int] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> Tracer | None:
        """What ``sys.settrace`` wants."""
        if event == "call":
            if not frame.f_code.co_filename.startswith(str(ROOT / "memtrack")):
                return None
            self._last[id(frame)] = 0
        elif event == "line":
            before = self._last.get(id(frame), 0)
            self.steps.add((frame.f_code, before, frame.f_lineno))
            self._last[id(frame)] = frame.f_lineno
        elif event == "return":
            self._last.pop(id(frame), None)
        return self


def steps_of(canvas: Canvas | Crate, data: bytes) -> set[Step]:
    """The steps that an input takes; AssertionError and the like if it is a finding."""
    tracer = Tracer()
    sys.settrace(tracer)
    try:
        canvas.try_input(data)
    finally:
        sys.settrace(None)
    return tracer.steps


def main(corpus: Path, folders: list[str]) -> None:
    """Rewrite the corpus."""
    inputs = {path.read_bytes() for folder in (corpus, *map(Path, folders)) for path in folder.iterdir()}
    kept: list[bytes] = []
    known: set[Step] = set()
    with tempfile.TemporaryDirectory() as folder:
        canvas = Crate() if corpus.name == "artifacts" else Canvas(folder)
        for data in sorted(inputs, key=lambda data: (len(data), data)):
            new = steps_of(canvas, data) - known
            if new:
                known |= new
                kept.append(data)
        if isinstance(canvas, Canvas):
            canvas.close()
    assert len(kept) <= MAX_FILES, len(kept)
    assert sum(map(len, kept)) <= MAX_BYTES
    for path in corpus.iterdir():
        path.unlink()
    for data in kept:
        (corpus / sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{len(kept)} of {len(inputs)} inputs kept, {sum(map(len, kept))} bytes, {len(known)} steps")


if __name__ == "__main__":
    main(Path(__file__).with_name(sys.argv[1]), sys.argv[2:])
