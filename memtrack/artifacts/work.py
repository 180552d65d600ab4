"""What the packing process does: see ``worker``, which is what is left of it before anything is loaded."""

from __future__ import annotations

import glob
import os
import shutil
from hashlib import sha256
from typing import TYPE_CHECKING, BinaryIO

from memtrack.artifacts.base import Earlier
from memtrack.artifacts.ledger import Ledger
from memtrack.artifacts.packing import Packer, Progress, Source
from memtrack.artifacts.store import remove

if TYPE_CHECKING:
    from memtrack.artifacts.worker import Job, _Line

SHOWN = 200
"""Artifacts in the text on what there is."""
AHEAD = 2
"""Packs that are made and not stored yet: what a slow network lets pile up on the disk."""


def work(job: Job, line: _Line) -> None:
    """Pack an artifact, let each pack be stored, and note what is. Raises what comes of files that cannot be read."""
    os.makedirs(job.folder, 0o700, exist_ok=True)
    ledger = Ledger(job.state)
    try:
        _clean(job, ledger)
        _Work(job, line, ledger).run()
    finally:
        ledger.close()


class _Work:
    def __init__(self, job: Job, line: _Line, ledger: Ledger) -> None:
        self._job = job
        self._line = line
        self._ledger = ledger
        self._waiting: set[str] = set()

    def run(self) -> None:
        job, ledger = self._job, self._ledger
        before = ledger.earlier(job.name, job.family) if job.use_base else None
        earlier = None if before is None else Earlier(ledger, before, held_folder(job.state, job.family), self._open)
        packer = Packer(
            ledger,
            job.folder,
            self._on_pack,
            self._on_progress,
            name=job.name,
            compress=job.compress,
            earlier=earlier,
            with_md5=job.with_md5,
        )
        sources = [Source(path, opened, mode, (size, at)) for path, opened, mode, _, size, at in job.sources]
        try:
            packed = packer.pack(sources, job.step, lambda plain: job.note + plain + "\n")
        finally:
            if earlier is not None:
                earlier.close()
        while self._waiting:
            self._hear()
        packs = {pack: [*(ledger.pack(pack) or (0, ""))[:2], packer.path_of(pack)] for pack in packed.packs}
        self._line.say(
            manifest=packed.manifest.path,
            md5=packed.manifest.md5,
            packs=packs,
            plain=packed.is_plain,
            changed=packed.changed,
        )
        self._hear("committed")
        originals = ((path, original) for path, _, _, original, *_ in job.sources)
        ledger.commit(job.name, job.family, originals, packed.raw_bytes, packed.new_bytes)
        if os.path.exists(packed.manifest.path):
            os.unlink(packed.manifest.path)
        self._hold(is_base=job.use_base and packed.has_numbers)
        path = os.path.join(job.state, "README.md")
        with open(path, "w", encoding="utf-8") as file:
            file.write(overview(ledger.artifacts(), job.source.removesuffix(job.name)))
        self._line.say(overview=path)

    def _on_pack(self, pack: str) -> None:
        while len(self._waiting) >= AHEAD:
            self._hear()
        self._waiting.add(pack)
        size, md5, _ = self._ledger.pack(pack) or (0, "", False)
        self._line.say(pack=pack, path=self._path_of(pack), size=size, md5=md5)

    def _on_progress(self, progress: Progress) -> None:
        self._line.say(progress=list(progress))

    def _hear(self, expected: str = "stored") -> None:
        word, _, pack = self._line.hear().partition(" ")
        if word != expected:
            raise ValueError(f"{word!r} was answered, not {expected!r}")
        if word == "stored":
            self._ledger.mark_stored(pack)
            self._waiting.discard(pack)
            self._evict()

    def _hold(self, *, is_base: bool) -> None:
        """Keep the links to the files if the next checkpoint can be told as a difference to this one."""
        job = self._job
        if job.held:
            place = held_folder(job.state, job.family)
            shutil.rmtree(place, ignore_errors=True)
            if is_base:
                os.replace(job.held, place)
            else:
                shutil.rmtree(job.held, ignore_errors=True)

    def _evict(self) -> None:
        """Of the packs that are stored, keep the newest, as many as may be kept."""
        if self._job.keeps_packs:
            return
        found = []
        with os.scandir(self._job.folder) as entries:
            for entry in entries:
                known = self._ledger.pack(entry.name.removesuffix(".mtz"))
                if known is not None and known[2]:
                    found.append((entry.stat().st_mtime_ns, entry.path, known[0]))
        room = self._job.cache_bytes
        for _, path, size in sorted(found, reverse=True):
            room -= size
            if room < 0:
                remove(path)

    def _path_of(self, pack: str) -> str:
        return os.path.join(self._job.folder, f"{pack}.mtz")

    def _open(self, pack: str) -> BinaryIO:
        return open(self._path_of(pack), "rb", buffering=0)


def overview(artifacts: list[tuple[str, int, int]], source: str) -> str:
    """A text in Markdown on what there is, as trackers show it; ``source`` is what sources begin with."""
    raw, new = sum(one[1] for one in artifacts), sum(one[2] for one in artifacts)
    shown = artifacts if len(artifacts) <= SHOWN else artifacts[-SHOWN:]
    left_out = f"The newest {SHOWN} of {len(artifacts)}. " if len(shown) < len(artifacts) else ""
    rows = [*((f"`{name}`", of, came) for name, of, came in shown), (f"all {len(artifacts)}", raw, new)]
    table = "\n".join(
        f"| {name} | {raw / 1e6:.1f} | {new / 1e6:.1f} | {raw / max(new, 1):.2f} |" for name, raw, new in rows
    )
    return f"""# Artifacts

Stored by memtrack, compressed and without what was there already. To restore one, byte for byte:

    memtrack restore {source}NAME

Without memtrack, with Python, numpy and a zstd, in a copy of this folder: `python restore.py NAME.mtz --to FOLDER`

{left_out}Sizes are in MB, of the files and of what was new in them as it is stored.

| artifact | size | new, as stored | times smaller |
|---|---:|---:|---:|
{table}
"""


def held_folder(state: str, family: str) -> str:
    """Where the links to the newest artifact of a family are."""
    return os.path.join(state, "held", sha256(family.encode()).hexdigest()[:16])


def _clean(job: Job, ledger: Ledger) -> None:
    """Remove what one that was killed has left, and learn what the store really has."""
    for part in glob.glob(os.path.join(glob.escape(job.folder), "*.part")):
        remove(part)
    if not job.keeps_packs:
        for path in glob.glob(os.path.join(glob.escape(job.folder), "*.mtz")):
            # killed after it was made, and before it was noted
            if ledger.pack(os.path.basename(path).removesuffix(".mtz")) is None:
                remove(path)
    if job.stored is not None:
        for pack in ledger.packs(is_stored=True):
            if pack not in job.stored:
                ledger.drop_pack(pack)
        for pack in ledger.packs(is_stored=False):
            size, _, _ = ledger.pack(pack) or (-1, "", False)
            if job.stored.get(pack) == size:  # killed after it was stored, and before it was noted
                ledger.mark_stored(pack)
