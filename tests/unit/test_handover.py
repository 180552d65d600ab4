"""What the training process leaves for who delivers after it: whole or not at all, and in memory only."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from memtrack.agent.handover import SLOT, Handed, Handover

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's anonymous memory")


@pytest.fixture
def handover():
    made = Handover()
    yield made
    made.close()


def test_comes_back_as_it_was_left(handover, monkeypatch, tmp_path):
    """Variables by feed, the module path and the directory; relative entries of the path are made absolute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/somewhere/ä b"])
    handover.put({"mlflow:1": {"TOKEN": "s=ec\nret", "EMPTY": ""}, "mlflow:2": {"TOKEN": "other"}, "jsonl:x": {}})
    handed = Handed(handover.fd)
    assert handed.environments == {
        "mlflow:1": {"TOKEN": "s=ec\nret", "EMPTY": ""},
        "mlflow:2": {"TOKEN": "other"},
        "jsonl:x": {},
    }
    assert handed.path == [f"{tmp_path}/", f"{tmp_path}/lib", "/somewhere/ä b"]
    assert handed.folder == str(tmp_path)


def test_nothing_was_left(handover):
    """An empty one, the null device, a pipe: all give nothing."""
    read_fd, write_fd = os.pipe()
    null_fd = os.open(os.devnull, os.O_RDONLY)
    for fd in (handover.fd, read_fd, null_fd):
        handed = Handed(fd)
        assert (handed.environments, handed.path, handed.folder) == ({}, [], "")
    for fd in (read_fd, write_fd, null_fd):
        os.close(fd)


def test_a_kill_in_the_middle_leaves_what_was_before(handover):
    """However much of the newest was written, it counts whole or not at all."""
    for turn in range(1, 6):
        handover.put({"key": {"TURN": str(turn)}})
    newest = 5 & 1
    length = 12 + int.from_bytes(os.pread(handover.fd, 4, newest * SLOT + 8), "little")
    whole = os.pread(handover.fd, length, newest * SLOT)
    handover.put({"key": {"TURN": "6"}})
    handover.put({"key": {"TURN": "7"}})
    later = os.pread(handover.fd, length, newest * SLOT)
    assert len(whole) == len(later)
    for cut in range(len(whole)):
        os.pwrite(handover.fd, later[:cut] + whole[cut:], newest * SLOT)
        assert Handed(handover.fd).environments["key"]["TURN"] in ("6", "7")
        if later[:cut] + whole[cut:] not in (later, whole):
            assert Handed(handover.fd).environments["key"]["TURN"] == "6"


def test_it_is_written_only_when_something_has_changed(handover, monkeypatch):
    """It is offered at each flush."""
    writes = []
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *arguments: writes.append(1) or write(*arguments))
    for value in ("a", "a", "b", "b", "a"):
        handover.put({"key": {"NAME": value}})
    assert len(writes) == 3


def test_what_has_no_room_is_left_out(handover):
    """One huge variable costs no other, and nothing of the next slot."""
    handover.put({"key": {"FIRST": "1", "HUGE": "x" * SLOT, "LAST": "2"}})
    handover.put({"key": {"FIRST": "1", "HUGE": "y" * (SLOT - 4096), "LAST": "2"}})
    found = Handed(handover.fd).environments["key"]
    assert found["FIRST"] == "1"
    assert found["LAST"] == "2"


def test_not_after_close():
    """A relay that still runs must not write into whatever has got the number of the descriptor since."""
    handover = Handover()
    fd = handover.fd
    handover.close()
    handover.close()
    other = os.memfd_create("other")
    assert other == fd
    handover.put({"key": {"NAME": "value"}})
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_from_several_threads(handover):
    """The last one counts, and every one that is read is whole."""

    def put(number):
        for turn in range(200):
            handover.put({"key": {"A": f"{number}.{turn}", "B": f"{number}.{turn}"}})

    threads = [threading.Thread(target=put, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = Handed(handover.fd).environments.get("key", {"A": "", "B": ""})
        assert found["A"] == found["B"]
    for thread in threads:
        thread.join()
