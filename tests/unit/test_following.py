"""Following a tracker: its functions do what they did, whatever memtrack makes of it."""

from __future__ import annotations

import os

import pytest

from memtrack.sinks.following import Follower


class Tracker:
    """Runs of a tracker that does not exist."""

    def __init__(self, name="", *, fails=False):
        if fails:
            raise ValueError("no such project")
        self.name = name

    def end(self, status="good"):
        """End it."""
        return f"{self.name} {status}"


class Sink:
    def __init__(self, run):
        self.run = run
        self.how = None

    def ending(self, how):
        self.how = how


class Attached:
    def __init__(self, sink):
        self.sink = sink
        self.detached = 0

    def detach(self):
        self.detached += 1


@pytest.fixture
def attached():
    return []


@pytest.fixture
def follower(attached):
    """Follows ``Tracker``, and forgets it afterwards."""
    originals = Tracker.__init__, Tracker.end

    def attach(make_sink):
        attached.append(Attached(make_sink()))
        return attached[-1]

    made = Follower(attach)
    made.after(Tracker, "__init__", lambda run: made.started(run, id(run), lambda: Sink(run)))
    made.before(Tracker, "end", lambda run, status="good": made.ended(id(run), status))
    yield made
    made.remove()
    assert (Tracker.__init__, Tracker.end) == originals


def test_from_start_to_end(follower, attached):
    """The sink is made at the start, told how the run ends, and detached before the tracker ends it."""
    run = Tracker("one")
    (fed,) = attached
    assert fed.sink.run is run
    assert run.end(status="bad") == "one bad"
    assert (fed.sink.how, fed.detached) == ("bad", 1)
    run.end()
    assert fed.detached == 1


def test_what_is_returned_and_raised_stays(follower, attached, notices):
    """So do names and docstrings; a run that could not be started is not fed."""
    with pytest.raises(ValueError, match="no such project"):
        Tracker(fails=True)
    assert attached == []
    assert Tracker.end.__name__ == "end"
    assert Tracker.end.__doc__ == "End it."
    with pytest.raises(TypeError, match="unexpected keyword"):
        Tracker("two").end(colour="red")


def test_a_hook_that_fails_is_told_once(follower, notices):
    """The tracker's function goes on all the same."""
    follower.before(Tracker, "end", lambda run, **_: 1 / 0)
    assert [Tracker("three").end() for _ in range(3)] == ["three good"] * 3
    (message,) = notices
    assert "ZeroDivisionError" in message


def test_the_same_run_is_fed_once(follower, attached):
    run = Tracker("four")
    follower.started(run, id(run), lambda: Sink(run))
    assert len(attached) == 1


def test_a_run_that_cannot_be_fed():
    """``attach`` has no monitor to offer: nothing is ended then."""
    follower = Follower(lambda make_sink: None)
    follower.started("run", "key", lambda: Sink("run"))
    follower.ended("key", "bad")


def test_removed(attached):
    """What was being fed is let go of; who has wrapped our function since then keeps theirs, which does nothing."""
    original = Tracker.end
    follower = Follower(lambda make_sink: attached.append(Attached(make_sink())) or attached[-1])
    follower.before(Tracker, "end", lambda run, status="good": follower.ended(id(run), status))
    ours = Tracker.end

    def theirs(run, *args):
        return ours(run, *args)

    Tracker.end = theirs
    run = Tracker("five")
    follower.started(run, id(run), lambda: Sink(run))
    follower.remove()
    assert attached[0].detached == 1
    assert attached[0].sink.how is None
    assert Tracker.end is theirs
    other = Tracker("six")
    follower.started(other, id(other), lambda: Sink(other))
    assert other.end() == "six good"
    assert len(attached) == 1
    Tracker.end = original


def test_a_forked_child_leaves_its_parents_runs_alone(follower, attached):
    """It neither ends them nor tells their sinks anything."""
    run = Tracker("seven")
    pid = os.fork()
    if pid == 0:
        follower.leave()
        follower.ended(id(run), "bad")
        os._exit(attached[0].detached + (attached[0].sink.how is not None))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run.end()
    assert attached[0].detached == 1
