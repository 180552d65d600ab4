"""Restores artifacts of memtrack, byte for byte, without memtrack: Python 3.9 or newer, numpy, and any zstd.

    python restore.py memtrack/NAME.mtz --to FOLDER          everything
    python restore.py memtrack/NAME.mtz --file PATH          one file out of many
    python restore.py memtrack/NAME.mtz --list               what there is

It looks for packs in the folder ``packs`` beside itself or above the manifest. As zstd it takes ``zstandard``, the
standard library's (Python 3.14), ``backports.zstd``, or the program ``zstd``.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING

from memtrack.artifacts.decoding import Damaged
from memtrack.artifacts.reading import Artifact, File
from memtrack.artifacts.tables import shown

if TYPE_CHECKING:
    from collections.abc import Callable


def restore_file(artifact: Artifact, file: File, folder: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Write a file below a folder: first beside its place, then, when it is whole and on disk, there. Gives the path.

    Raises Damaged or OSError, and leaves no file then.
    """
    path = os.path.join(folder, *file.path.split("/"))
    place = os.path.dirname(path) or "."
    inside = os.path.join(os.path.realpath(folder), "")
    if not os.path.join(os.path.realpath(place), "").startswith(inside):
        raise Damaged(f"{shown(file.path)} would be outside of {folder}: a link there leads out of it")
    if os.path.isdir(path) and not os.path.islink(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    os.makedirs(place, exist_ok=True)
    fd, part = tempfile.mkstemp(prefix=".memtrack-", suffix=".part", dir=place)
    try:
        with open(fd, "wb", buffering=0) as out:
            for _, block in artifact.blocks(file):
                view = memoryview(block).cast("B")
                while view:
                    view = view[out.write(view) :]
                if on_bytes is not None:
                    on_bytes(len(block))
            if artifact.digest(file) != file.digest:
                raise Damaged(f"{shown(file.path)} is not what it was: its blocks are others")
            os.fsync(out.fileno())
        os.chmod(part, file.mode)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return path


def room_in(folder: str) -> int:
    """The bytes that are free where a folder is, or will be."""
    at = os.path.abspath(folder)
    while not os.path.exists(at):
        at = os.path.dirname(at)
    return shutil.disk_usage(at).free


def find_packs(manifest: str) -> str:
    """The folder with the packs: beside this file, or beside or above the manifest."""
    at = os.path.dirname(os.path.abspath(manifest))
    above = [at, os.path.dirname(at), os.path.dirname(os.path.dirname(at))]
    candidates = [os.path.join(one, "packs") for one in (os.path.dirname(os.path.abspath(__file__)), *above)]
    return next((one for one in candidates if os.path.isdir(one)), candidates[0])


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Restores an artifact of memtrack, byte for byte.")
    parser.add_argument("manifest", help="the file NAME.mtz")
    parser.add_argument("--to", default=".", metavar="FOLDER", help="where to; default here")
    parser.add_argument("--file", metavar="PATH", help="only this file")
    parser.add_argument("--packs", metavar="FOLDER", help="where the packs are")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args(arguments)
    packs = options.packs or find_packs(options.manifest)
    if hasattr(sys.stdout, "reconfigure"):  # a name may have characters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with open(options.manifest, "rb") as manifest:
            artifact = Artifact(manifest, lambda pack: open(os.path.join(packs, f"{pack}.mtz"), "rb"))  # noqa: SIM115
        if options.file is not None and options.file not in artifact.files:
            raise Damaged(f"there is no file {options.file!r}; --list shows what there is")
        files = [file for file in artifact.files.values() if options.file in (None, file.path)]
        size, room = sum(file.size for file in files), room_in(options.to)
        if size > room and not options.list:
            raise Damaged(f"it comes to {size:,} bytes, and {options.to} has {room:,} free")
        status = 0
        for file in files:
            if options.list:
                print(f"{file.size:>15,}  {shown(file.path)}")
                continue
            try:
                print(shown(restore_file(artifact, file, options.to)))
            except Damaged as exc:
                print(f"{shown(file.path)}: {exc}", file=sys.stderr)
                status = 1
        artifact.close()
        return status
    except (Damaged, OSError, ImportError) as exc:
        print(shown(str(exc)), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
