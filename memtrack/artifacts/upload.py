"""An artifact on its way, as who has asked for it sees it."""

from __future__ import annotations

import os
import threading
from time import monotonic

from memtrack.notices import warn_once


class Upload:
    """An artifact on its way to a store, as ``memtrack.log_artifact`` returns it. Thread-safe."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        """Of the artifact."""
        self.source = source
        """What ``memtrack.restore`` takes for it: ``mlflow:RUN_ID/NAME``."""
        self.error = ""
        """Why it could not be stored, or not yet; "" if nothing is wrong."""
        self.bytes_done = self.bytes_total = self.bytes_stored = 0
        """How much has been read, of how much, and what that came to in packs, in bytes; what was stored before counts
        as read only."""
        self._began_s = monotonic()
        self._over = threading.Event()
        self._is_stored = False

    @property
    def done(self) -> bool:
        """Whether the store has all of it."""
        return self._is_stored

    @property
    def is_over(self) -> bool:
        """Whether nobody tries to store it any more, well or not."""
        return self._over.is_set()

    @property
    def eta_s(self) -> float | None:
        """In how many seconds it will have been read, at the speed so far; None while nobody can tell."""
        if not self.bytes_done or not self.bytes_total:
            return None
        return (monotonic() - self._began_s) / self.bytes_done * (self.bytes_total - self.bytes_done)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is over, for good or not. Returns whether it is stored; ``error`` tells why not. Never raises.

        A store that does not answer is tried again and again, so without a time-out this may take as long as that.
        """
        self._over.wait(timeout_s)
        return self._is_stored

    def __str__(self) -> str:
        if self._is_stored:
            how_far = "stored"
        elif self.is_over:
            how_far = "not stored"
        elif not self.bytes_done:
            how_far = "waiting"
        else:
            eta = "" if self.eta_s is None else f", {self.eta_s:.0f} s left"
            how_far = f"{self.bytes_done / max(self.bytes_total, 1):.0%} of {self.bytes_total / 1e6:.1f} MB{eta}"
        ratio = f", {self.bytes_done / self.bytes_stored:.2f}x smaller" if self.bytes_stored else ""
        return f"{self.name}: {how_far}{ratio}{f' ({self.error})' if self.error else ''}"

    def __repr__(self) -> str:
        return f"<memtrack.Upload to {self.source}: {self}>"

    def settle(self, error: str = "") -> None:
        """It is over: it is stored, or ``error`` tells why not. For who stores it."""
        self.error, self._is_stored = error, not error
        self._over.set()


def warn(upload: Upload, what_now: str) -> None:
    """Tell once a store what is wrong with an artifact."""
    warn_once(
        f"artifact {os.path.dirname(upload.source)}",
        f"memtrack cannot store {upload.name} ({upload.error}). It {what_now}.",
        "",
    )
