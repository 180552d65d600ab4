"""``restore.py`` as it travels with artifacts: ``decoding``, ``reading`` and ``restore``, one after the other."""

from __future__ import annotations

import os
import re

HERE = os.path.dirname(os.path.abspath(__file__))


def script() -> str:
    """The text. It begins with what ``restore`` says of itself, and needs numpy and a zstd."""
    future = "from __future__ import annotations\n"
    decoding, reading, restore = (_source(name).partition(future) for name in ("decoding", "reading", "restore"))
    own = re.compile(r"^from memtrack\.artifacts\.\w+ import .*\n", re.MULTILINE)
    return (
        restore[0]
        + future
        + "\n\n".join(own.sub("", part[2]).strip("\n") for part in (decoding, reading, restore))
        + "\n"
    )


def _source(name: str) -> str:
    with open(os.path.join(HERE, f"{name}.py"), encoding="utf-8") as file:
        return file.read()
