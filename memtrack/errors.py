"""What memtrack raises.

    MemtrackError
    ├── SettingsError            (ValueError)    an argument or MEMTRACK_* variable is wrong
    ├── MissingDependencyError   (ImportError)   an extra is not installed; the message ends with the command
    ├── MonitorError             (RuntimeError)  start, stop or attach in a state that does not allow it
    ├── AgentError               (RuntimeError)  the agent process could not be started
    ├── RecordingError           (OSError)       a recording cannot be made, opened or found
    │   └── RecordingFormatError                 the file is not a recording, or of a version this memtrack cannot read
    ├── ArtifactError            (OSError)       an artifact cannot be packed, restored or deleted
    │   ├── ArtifactNotFoundError                there is no such artifact, or a part of it is missing
    │   └── ArtifactFormatError                  what is there is damaged, or none of ours
    └── DeliveryError            (OSError)       a tracker did not take a batch
        └── RejectedError                        and never will: sending it again is pointless

Each is raised before anything was started or lost. Once monitoring runs, nothing is raised into the training process.
"""

from __future__ import annotations


class MemtrackError(Exception):
    """Base of everything that memtrack raises on purpose."""


class SettingsError(MemtrackError, ValueError):
    """A setting is wrong. ``name`` is the argument or variable, ``value`` what was given."""

    def __init__(self, name: str, value: object, fix: str) -> None:
        super().__init__(f"{name}={value!r}: {fix}")
        self.name = name
        self.value = value


class MissingDependencyError(MemtrackError, ImportError):
    """A feature needs a package that is not installed. ``extra`` is the one to install."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs a package that is not installed. Install it with: pip install 'memtrack[{extra}]'"
        )
        self.extra = extra


class MonitorError(MemtrackError, RuntimeError):
    """The monitor is in a state that does not allow the call."""


class AgentError(MemtrackError, RuntimeError):
    """The agent process could not be started."""


class RecordingError(MemtrackError, OSError):
    """A recording cannot be made, opened or found."""


class RecordingFormatError(RecordingError):
    """The file is not a recording that this version can read."""


class ArtifactError(MemtrackError, OSError):
    """An artifact cannot be packed, restored or deleted."""


class ArtifactNotFoundError(ArtifactError):
    """There is no such artifact, or something that it needs is no longer stored."""


class ArtifactFormatError(ArtifactError):
    """What is stored is damaged, or was not made by memtrack."""


class DeliveryError(MemtrackError, OSError):
    """A tracker did not take a batch; it may later. ``retry_after_s`` is what the tracker asked for, if it did."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RejectedError(DeliveryError):
    """A tracker refused the batch for good. ``run_gone``: because of the run, so that no other batch will be taken."""

    def __init__(self, message: str, *, run_gone: bool = False) -> None:
        super().__init__(message)
        self.run_gone = run_gone
