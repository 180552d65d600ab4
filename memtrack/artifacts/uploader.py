"""What the training process does for an artifact: it lets another one pack, and hands what that has made to the store.

One thread for all artifacts of the process, which mostly waits. Packs go to the tracker through the client that the
program has loaded anyway, so that no other process has to load it again.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from memtrack.agent.launch import interpreter
from memtrack.artifacts.pending import leftovers
from memtrack.artifacts.script import script
from memtrack.artifacts.store import PACKS, ROOT, Pack
from memtrack.artifacts.upload import Upload, warn
from memtrack.errors import DeliveryError, MemtrackError, RejectedError
from memtrack.notices import warn_once

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from memtrack.artifacts.pending import Pending
    from memtrack.artifacts.store import Store
    from memtrack.artifacts.worker import Job

HERE = os.path.dirname(os.path.abspath(__file__))
RESTORE = f"{ROOT}/restore.py"
OVERVIEW = f"{ROOT}/README.md"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between two attempts."""
SILENT_S = 2.0
"""How long the end of the program is waited with before it is said what for."""
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""numpy's libraries take memory for each thread when they are loaded."""


class Task(NamedTuple):
    """An artifact to be stored."""

    upload: Upload
    store: Store
    job: Job
    pending: Pending
    """What tells of it if this process does not come to an end with it."""
    fds: tuple[int, ...] = ()
    """Files that are held open for the process that packs."""


class _Given(Exception):
    """It is not tried again: the program ends."""


class _Gone(Exception):
    """The store has not all that it was thought to have."""


class _Wrong(Exception):
    """Trying again would not help, or, with ``again``, not at once."""

    def __init__(self, text: str, *, again: bool) -> None:
        super().__init__(text)
        self.again = again


class Uploader:
    """The artifacts of this process, one after the other. Thread-safe. A forked child has one of its own."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._giving_up = threading.Event()
        self._current: Task | None = None
        self._thread: threading.Thread | None = None
        self._stocked: set[str] = set()
        """Stores that were asked what they have."""
        self._watched: set[str] = set()
        """Those whose end is waited for."""

    def add(self, task: Task) -> None:
        """Store an artifact when those before it are."""
        with self._changed:
            if task.store.key not in self._watched:
                self._watched.add(task.store.key)
                key = task.store.key
                task.store.before_end(lambda: self.wait_for_run(key))
            self._tasks.append(task)
            if self._thread is None or not self._thread.is_alive():
                atexit.unregister(self.at_exit)
                atexit.register(self.at_exit)
                self._thread = threading.Thread(target=self._run, name="memtrack-artifacts", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pending(self, key: str | None = None) -> list[Upload]:
        """What is on its way, to all stores or to the one with this key."""
        with self._changed:
            tasks = [*([self._current] if self._current is not None else []), *self._tasks]
        return [task.upload for task in tasks if key in (None, task.store.key)]

    def finish(self, timeout_s: float, key: str | None = None) -> bool:
        """Wait for what is on its way, and say so if it takes long. Returns whether all of it is stored."""
        deadline, told, uploads = monotonic() + timeout_s, False, self.pending(key)
        for upload in uploads:
            upload.wait(max(min(SILENT_S, deadline - monotonic()), 0.0))
            while not upload.is_over and monotonic() < deadline:
                if not told:
                    told = True
                    _say(f"memtrack: waiting up to {timeout_s:g} s for artifacts (Ctrl-C ends that)")
                _say(f"memtrack: {upload}")
                upload.wait(min(5 * SILENT_S, max(deadline - monotonic(), 0.0)))
        return all(upload.done for upload in uploads)

    def wait_for_run(self, key: str) -> None:
        """The run with this key is about to end. Never raises."""
        try:
            self.finish(exit_wait_s(), key)
        except KeyboardInterrupt:
            pass  # that ends the waiting, and the run ends in order
        except Exception as exc:
            warn_once("artifact wait", f"memtrack does not wait for artifacts ({type(exc).__name__}: {exc}).")

    def at_exit(self) -> None:
        """The program ends: what is not stored within a while is left for the next one."""
        try:
            self.finish(exit_wait_s())
        except KeyboardInterrupt:
            pass
        self.give_up()
        for upload in (one for one in self.pending() if not one.is_over):
            _say(f"memtrack: {upload.name} is not stored yet; log it once more, or run: memtrack sync")

    def give_up(self) -> None:
        """Leave what is not stored to the next process, now."""
        self._giving_up.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(0.5)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._giving_up.is_set():
                    self._changed.wait()
                if self._giving_up.is_set():
                    return
                self._current = self._tasks.popleft()
            task = self._current
            try:
                self._store(task)
            except _Given:
                return  # it is pending
            except Exception as exc:
                task.upload.settle(f"{type(exc).__name__}: {exc}")
                warn(task.upload, "is not tried again")
            for fd in task.fds:
                os.close(fd)
            task.pending.done(held=task.job.held)
            self._current = None

    def _store(self, task: Task) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                self._attempt(task)
                task.upload.settle()
                return
            except _Gone:
                continue
            except _Wrong as exc:
                task.upload.error = str(exc)
                if not exc.again:
                    task.upload.settle(str(exc))
                    warn(task.upload, "is not tried again")
                    return
                warn(task.upload, "is tried again")
            if self._giving_up.wait(pause_s):
                raise _Given
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _attempt(self, task: Task) -> None:
        store, stored = task.store, None
        if store.key not in self._stocked:
            names = self._patiently(task, store.names)
            stored = {name[len(PACKS) : -len(".mtz")]: size for name, size in names.items() if name.startswith(PACKS)}
            self._put_script(task, names)
            self._stocked.add(store.key)
            self._go_on(task)
        worker = _start(task.job._replace(stored=stored), task.fds)
        try:
            self._serve(task, worker)
        finally:
            _end(worker)

    def _go_on(self, task: Task) -> None:
        """See to what an earlier process has left of the same run."""
        left = [
            Task(Upload(one.job.name, one.source), task.store, one.job, one.pending)
            for one in leftovers(task.job.state)
        ]
        with self._changed:
            self._tasks.extend(left)

    def _put_script(self, task: Task, names: dict[str, int]) -> None:
        """Let what restores without memtrack be there, too."""
        text = script().encode()
        if names.get(RESTORE) != len(text):
            path = os.path.join(task.job.state, "restore.py")
            with open(path, "wb") as file:
                file.write(text)
            md5 = _md5(text) if task.job.with_md5 else ""
            self._patiently(task, lambda: task.store.put(path, RESTORE, md5))

    def _serve(self, task: Task, worker: subprocess.Popen[str]) -> None:
        """Store what the worker makes, until it has everything."""
        assert worker.stdout is not None
        for line in worker.stdout:
            if self._giving_up.is_set():
                raise _Given
            said = json.loads(line)
            if "progress" in said:
                task.upload.bytes_done, task.upload.bytes_total, task.upload.bytes_stored = said["progress"]
            elif "pack" in said:
                self._put(task, said)
                _answer(worker, f"stored {said['pack']}")
            elif "manifest" in said:
                self._commit(task, said)
                _answer(worker, "committed")
            elif "overview" in said:
                self._put_overview(task, said["overview"])
                return
            else:
                raise _Wrong(said["error"], again=said["again"])
        raise _Wrong(f"the process that packs has ended with status {worker.wait()}", again=True)

    def _put(self, task: Task, said: dict[str, Any]) -> None:
        self._patiently(task, lambda: task.store.put(said["path"], f"{PACKS}{said['pack']}.mtz", said["md5"]))

    def _put_overview(self, task: Task, path: str) -> None:
        """Let people see what there is, where a tracker shows a text; the artifacts can do without."""
        if not task.store.keeps_files:
            try:
                task.store.put(path, OVERVIEW, "")
            except MemtrackError:
                return

    def _commit(self, task: Task, said: dict[str, Any]) -> None:
        packs = {f"{PACKS}{pack}.mtz": Pack(*row) for pack, row in said["packs"].items()}
        if packs.keys() - self._patiently(task, task.store.names).keys():
            # somebody has deleted what was there when this process began: it is packed again, unlike the rest
            self._stocked.discard(task.store.key)
            raise _Gone
        name = f"{ROOT}/{task.job.name}.mtz"
        self._patiently(task, lambda: task.store.commit(said["manifest"], name, said["md5"], packs))
        for path in said["changed"]:
            what = f"{path} was written to before memtrack had read it: {task.upload.name} has what came later."
            warn_once(f"artifact changed {task.upload.name}", what, " Wait for the upload first.")

    def _patiently(self, task: Task, call: Callable[[], Any]) -> Any:
        """Call the store until it answers; what is wrong is told once."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                found = call()
                task.upload.error = ""
                return found
            except DeliveryError as exc:
                task.upload.error = str(exc)
                if isinstance(exc, RejectedError) and exc.run_gone:
                    raise _Wrong(str(exc), again=False) from exc
                warn(task.upload, "is tried again")
                if isinstance(exc, RejectedError):
                    pause_s = LONGEST_PAUSE_S
                pause_s = max(pause_s, exc.retry_after_s or 0.0)
            except MemtrackError as exc:
                raise _Wrong(str(exc), again=False) from exc
            if self._giving_up.wait(pause_s):
                raise _Given
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _md5(text: bytes) -> str:
    from hashlib import md5  # it brings OpenSSL, 4 MiB, which most of those who want an md5 have loaded

    return md5(text, usedforsecurity=False).hexdigest()


def _start(job: Job, fds: tuple[int, ...]) -> subprocess.Popen[str]:
    import subprocess

    debug = bool(os.environ.get("MEMTRACK_DEBUG"))
    worker = subprocess.Popen(
        [interpreter(), os.path.join(HERE, "worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        pass_fds=fds if os.name == "posix" else (),
        env={**os.environ, **SINGLE_THREADED},
        text=True,
    )
    _answer(worker, json.dumps(job._asdict()))
    return worker


def _answer(worker: subprocess.Popen[str], text: str) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(text + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; what it said last tells why


def _end(worker: subprocess.Popen[str]) -> None:
    import subprocess

    for pipe in (worker.stdin, worker.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            pass
    try:
        worker.wait(0.2)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def exit_wait_s() -> float:
    """How long the end of the program may be delayed: ``MEMTRACK_ARTIFACT_WAIT``, 60 s by default."""
    from memtrack import config

    return config.seconds("MEMTRACK_ARTIFACT_WAIT", os.environ.get("MEMTRACK_ARTIFACT_WAIT") or 60.0)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


_uploader = Uploader()


def current() -> Uploader:
    """That of this process."""
    return _uploader


def _begin_anew() -> None:
    """After a fork: the parent's artifacts are the parent's, and so is the thread."""
    global _uploader
    atexit.unregister(_uploader.at_exit)
    _uploader = Uploader()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
