"""``restore.py`` as it travels with artifacts: the modules that restore them, one after the other."""

from __future__ import annotations

import os
import re

PARTS = ("decoding", "tables", "reading", "restore")
"""Each needs those before it, and numpy; what they are called differs from one to the other."""
HERE = os.path.dirname(os.path.abspath(__file__))


def script() -> str:
    """The text. It begins with what ``restore`` says of itself, and needs numpy and a zstd."""
    future = "from __future__ import annotations\n"
    sources = [_source(name).partition(future) for name in PARTS]
    own = re.compile(r"^from memtrack\.artifacts\.\w+ import (?:\([^)]*\)|.*)\n", re.MULTILINE)
    return sources[-1][0] + future + "\n\n".join(own.sub("", source).strip("\n") for *_, source in sources) + "\n"


def _source(name: str) -> str:
    with open(os.path.join(HERE, f"{name}.py"), encoding="utf-8") as file:
        return file.read()
