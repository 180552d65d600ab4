"""Every test starts and ends without a monitor, and fails if memtrack had to warn and the test did not ask for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from typing import IO

import pytest

from memtrack import notices as memtrack_notices

# Started in the background by a shell, or by nohup: programs that tests start would not be stopped from the keyboard,
# or by the end of a terminal, either.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def _memtrack(tmp_path, monkeypatch, request):
    """Settings from outside do not reach the tests; recordings go to ``tmp_path``; what was started is stopped."""
    for variable in list(os.environ):
        if variable.startswith("MEMTRACK_") and not variable.startswith("MEMTRACK_TEST_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("MEMTRACK_DIR", str(tmp_path))
    # most tests count windows; what is left out by default has tests of its own
    monkeypatch.setenv("MEMTRACK_SELECTIVE", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    memtrack_notices.forget()
    collector = _Collector()
    logger = logging.getLogger("memtrack")
    logger.addHandler(collector)
    yield collector.messages
    _stop_everything()
    logger.removeHandler(collector)
    memtrack_notices.forget()
    if collector.messages and "notices" not in request.fixturenames:
        pytest.fail(f"memtrack warned: {collector.messages}")


@pytest.fixture
def notices(_memtrack):
    """The warnings of memtrack so far. A test that asks for them may have some; any other test fails on the first."""
    return _memtrack


def _stop_everything() -> None:
    autologging = sys.modules.get("memtrack.autologging")
    if autologging is not None:
        autologging._take_back()
    monitor = sys.modules.get("memtrack.monitor")
    if monitor is not None and monitor.active.monitor is not None:
        monitor.active.monitor.stop()


ROOM = pytest.StashKey[IO[str]]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """A test marked ``alone`` measures time: no other process of the suite tests meanwhile.

    Two locks, which the kernel takes back whatever happens: who waits to be alone stands in the door, so that the
    others, which come again and again, cannot keep it waiting for ever. MEMTRACK_TEST_ROOM names their folder when
    several suites test at once.
    """
    stash = item.config.stash
    workers = getattr(item.config, "workerinput", None)
    folder = os.environ.get("MEMTRACK_TEST_ROOM")
    if folder is None and workers is None:
        return (yield)
    import fcntl

    folder = folder or os.path.join(tempfile.gettempdir(), f"memtrack-tests-{workers['testrunuid']}")
    os.makedirs(folder, exist_ok=True)
    alone = item.get_closest_marker("alone")
    if ROOM not in stash:
        with open(os.path.join(folder, "door"), "w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            stash[ROOM] = open(os.path.join(folder, "room"), "w")  # noqa: SIM115
            fcntl.flock(stash[ROOM], fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        # who is alone stays so for the next test: everybody would have to come to an end again, each time
        if not (alone and nextitem is not None and nextitem.get_closest_marker("alone")):
            stash[ROOM].close()
            del stash[ROOM]


FAULTS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def fault(request):
    """Notes a fault that a test has injected, ``fault(what, lost, delay_s)``, in the table that the suite leaves.

    ``lost`` says in words what was lost; ``delay_s`` is how much longer the training process took than without memtrack
    or without the fault: 2 s at the most, at its exit only.
    """
    rows = request.config.stash.setdefault(FAULTS, [])

    def note(what: str, lost: str = "nothing", delay_s: float = 0.0) -> None:
        assert delay_s <= 2.0, f"{what}: delayed by {delay_s:.2f} s"
        rows.append((what, lost, f"{max(delay_s, 0.0):.2f} s"))

    return note


def pytest_sessionfinish(session):
    """Leave the table of faults in ``test-artifacts/faults.md``; of several processes that test, the first does."""
    rows = session.config.stash.get(FAULTS, [])
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = rows
    elif rows:
        folder = session.config.rootpath / "test-artifacts"
        folder.mkdir(exist_ok=True)
        lines = ["| fault | lost | training delayed by |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        (folder / "faults.md").write_text("\n".join(lines) + "\n")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Collect the rows of another process."""
    node.config.stash.setdefault(FAULTS, []).extend(getattr(node, "workeroutput", {}).get("faults", []))


@pytest.fixture
def make_recording(tmp_path):
    """Makes empty recordings: ``make_recording(size)`` returns the path of a new one."""
    from memtrack.recording import layout
    from memtrack.recording.writer import create

    made = 0

    def make(size: int = layout.MIN_SIZE, **fields: str) -> str:
        nonlocal made
        path = str(tmp_path / f"test-{made}.mtk")
        made += 1
        create(path, size, {"size": str(size), **fields})
        return path

    return make
