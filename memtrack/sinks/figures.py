"""What a run ends with, and the words and numbers that every tracker gets of it."""

from __future__ import annotations

from typing import NamedTuple

import memtrack


class RunFigures(NamedTuple):
    """What a run ends with. Memory in MiB, shares in percent; None where it could not be measured."""

    peak_rss_mib: float | None = None
    peak_label: str = ""
    """``exact``, ``sampled`` or ``bound``."""
    peak_wall_s: float | None = None
    """When the peak stood, Unix time."""
    peak_phase: str = ""
    peak_step: int | None = None
    peak_epoch: int | None = None
    peak_tree_pss_mib: float | None = None
    processes_max: int = 1
    limit_mib: float | None = None
    limit_source: str = ""
    headroom_min_pct: float | None = None
    seconds: float = 0.0
    agent_rss_mib: float | None = None
    agent_cpu_pct: float | None = None
    windows: int = 0
    dropped: int = 0
    merged: int = 0
    """Windows that were merged because the recording was full; their extremes are exact all the same."""
    verdict: str = ""
    """How the process ended, one of ``memtrack.recording.records.KINDS``; "" while it lives."""
    verdict_confidence: str = ""
    """``certain``, ``confirmed``, ``likely`` or ``none``."""
    verdict_text: str = ""
    """The verdict as a sentence."""
    verdict_evidence: tuple[str, ...] = ()
    stack: str = ""
    """The Python stack that goes with the verdict or the peak, a line a frame, innermost first."""
    exit_code: int | None = None
    signal: int | None = None
    end_wall_s: float | None = None
    """When what is told of ended, Unix time; None: now."""

    @property
    def is_bad_end(self) -> bool:
        """Whether the process has died, and not in order."""
        return self.verdict not in ("", "clean")

    @property
    def verdict_name(self) -> str:
        """The verdict in words: ``out of memory``; "" while the process lives."""
        return self.verdict.replace("_", " ").replace("sigkill", "SIGKILL")

    def numbers(self) -> dict[str, float]:
        """What is worth sorting runs by, as far as it is known."""
        names = (
            *("peak_rss_mib", "peak_tree_pss_mib", "peak_step", "headroom_min_pct", "limit_mib"),
            *("agent_rss_mib", "agent_cpu_pct", "windows", "dropped"),
        )
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def texts(self) -> dict[str, str]:
        """What is to be read: of the peak, and of the end if it was a bad one."""
        found = {
            "version": memtrack.__version__,
            "peak_label": self.peak_label,
            "peak_phase": self.peak_phase,
            "limit_source": self.limit_source,
            "stack": self.stack,
        }
        if self.is_bad_end:
            known = self.verdict_confidence in ("confirmed", "likely")
            found["verdict"] = self.verdict_name + (f" ({self.verdict_confidence})" if known else "")
            found["verdict_text"] = self.verdict_text
            found["evidence"] = "\n".join(self.verdict_evidence)
        return {name: text for name, text in found.items() if text}
