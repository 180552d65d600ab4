"""What a run ends with, and the words and numbers that every tracker gets of it."""

from __future__ import annotations

from typing import NamedTuple

import memtrack


class PartFigures(NamedTuple):
    """A phase by its path, or an epoch, or several that follow each other. Memory in MiB; None: not known."""

    name: str
    seconds: float
    peak_rss_mib: float
    peak_label: str
    """``exact``, ``sampled``, ``bound`` (it stood no higher) or ``estimated`` (it was over before anybody looked)."""
    peak_step: int | None
    last_rss_mib: float
    growth_mib: float | None
    """How much more the process held at its end than at its beginning, over all times that it was open."""
    limit_pct: float | None
    """The largest share of the memory limit that was in use in it, by whomever."""

    def __str__(self) -> str:
        growth = "" if self.growth_mib is None else f", {self.growth_mib:+.1f} MiB"
        share = "" if self.limit_pct is None else f", {self.limit_pct:.1f} % of the limit in use"
        return f"{self.name}: {self.peak_rss_mib:.1f} MiB ({self.peak_label}){growth}{share}"


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
    ranks: int | None = None
    """How many ranks of a distributed training there were on this node; None: this is not the first of several."""
    worst_rank: int | None = None
    """The one with the largest peak."""
    worst_rank_peak_mib: float | None = None
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
    phases: tuple[PartFigures, ...] = ()
    epochs: tuple[PartFigures, ...] = ()

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
            *("ranks", "worst_rank", "worst_rank_peak_mib"),
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
            "phases": "\n".join(map(str, self.phases)),
            "epochs": "\n".join(map(str, self.epochs)),
        }
        if self.is_bad_end:
            known = self.verdict_confidence in ("confirmed", "likely")
            found["verdict"] = self.verdict_name + (f" ({self.verdict_confidence})" if known else "")
            found["verdict_text"] = self.verdict_text
            found["evidence"] = "\n".join(self.verdict_evidence)
        return {name: text for name, text in found.items() if text}

    def table(self) -> tuple[list[str], list[list[str | float | None]]]:
        """Phases and epochs as names of columns and rows, for trackers that show tables; no rows if there are none."""
        parts = [("phase", phase) for phase in self.phases] + [("epoch", epoch) for epoch in self.epochs]
        return ["part", *PartFigures._fields], [[kind, *part] for kind, part in parts]
