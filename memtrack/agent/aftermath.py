"""What the agent does besides sampling: deliver what a dead process left behind, and keep the folder in order."""

from __future__ import annotations


def deliver(path: str) -> None:
    """Become the process that delivers what is left of the recording at ``path``; return if nothing is."""
