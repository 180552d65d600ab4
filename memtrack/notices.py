"""What memtrack has to say while a training runs: each thing once, as a log message, never as an exception."""

from __future__ import annotations

_said: set[str] = set()


def warn_once(key: str, message: str, consequence: str = " Training goes on, with less telemetry.") -> None:
    """Log a warning on the logger ``memtrack``, unless one with this key was logged before in this process."""
    if key in _said:
        return
    _said.add(key)
    # imported here: a process that never has to be warned does without it
    import logging

    logging.getLogger("memtrack").warning("%s%s", message, consequence)


def forget() -> None:
    """Let everything be said again, for tests."""
    _said.clear()
