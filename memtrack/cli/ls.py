"""``memtrack ls``: the recordings in a folder."""

from __future__ import annotations

from memtrack.cli.options import Directory, folder


def ls(directory: Directory = None) -> None:
    """List the recordings in the folder, newest first."""
    from memtrack.cli.console import stdout
    from memtrack.report.recordings import list_recordings
    from memtrack.report.terminal import listing

    path = folder(directory)
    listed = list_recordings(path)
    console = stdout()
    if not listed:
        console.print(f"no recordings in {path}", markup=False, soft_wrap=True)
        return
    console.print(listing(listed, path))
