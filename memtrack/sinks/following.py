"""Following a tracker's runs: what its own functions tell, while they return and raise what they always did."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from memtrack.notices import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Attach = Callable[[Callable[[], Any]], Any]


class _Fed:
    """A run that is being fed. It is held, so that no other object gets its ``id()``."""

    def __init__(self, run: object) -> None:
        self.run = run
        self.sink: Any = None
        self.attached: Any = None


class Follower:
    """Learns when runs start and end from functions of the tracker's classes, and feeds the runs in between.

    A subclass hooks itself on with ``before`` and ``after`` and calls ``started`` and ``ended``. ``attach`` gets what
    makes the sink of a run, begins to feed it, and never raises; what it returns has ``detach``, or is None.
    """

    def __init__(self, attach: Attach) -> None:
        self._attach = attach
        # by process too: what a forked child finds here is its parent's
        self._fed: dict[tuple[int, Hashable], _Fed] = {}
        self._wrapped: list[tuple[type, str, Any, Any]] = []
        self._off = False

    def before(self, owner: type, name: str, hook: Callable[..., None]) -> None:
        """From now on call ``hook`` with the arguments of each call of ``owner.name``, before that."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            self._call(hook, *args, **kwargs)
            return original(*args, **kwargs)

        self._put(owner, name, original, ours)

    def after(self, owner: type, name: str, hook: Callable[[Any], None]) -> None:
        """From now on call ``hook`` with the object after each call of its method ``name`` that does not raise."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def ours(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(this, *args, **kwargs)
            self._call(hook, this)
            return result

        self._put(owner, name, original, ours)

    def started(self, run: object, key: Hashable, make_sink: Callable[[], Any]) -> None:
        """Feed a run from now on, unless it is being fed already."""
        fed = _Fed(run)
        # no lock: a forked child might find it held by a thread that it does not have
        if self._off or self._fed.setdefault((os.getpid(), key), fed) is not fed:
            return

        def make() -> Any:
            fed.sink = make_sink()
            return fed.sink

        fed.attached = self._attach(make)

    def ended(self, key: Hashable, how: Any = None) -> None:
        """Deliver what is left of a run; ``how`` it ends is told to its sink (``ending``), if it is known."""
        fed = self._fed.pop((os.getpid(), key), None)
        if fed is None:
            return
        if fed.sink is not None and how is not None:
            fed.sink.ending(how)
        if fed.attached is not None:
            fed.attached.detach()

    def leave(self) -> None:
        """End the feeding of every run of this process."""
        for pid, key in list(self._fed):
            if pid == os.getpid():
                self.ended(key)

    def remove(self) -> None:
        """Put the originals back, and let go of the runs that are being fed."""
        self._off = True
        while self._wrapped:
            owner, name, original, ours = self._wrapped.pop()
            # who has wrapped it since then calls ours, which passes on and does nothing else from now on
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        self.leave()

    def _put(self, owner: type, name: str, original: Any, ours: Any) -> None:
        self._wrapped.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def _call(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as exc:
            warn_once("following", f"memtrack does not follow this run ({type(exc).__name__}: {exc}).")


class Ends:
    """What is waited for before the runs of a tracker end. Nothing is replaced before somebody wants that."""

    def __init__(self) -> None:
        self._follower: Follower | None = None
        self._waits: dict[int, tuple[object, Callable[[], None]]] = {}

    def add(self, owner: type, method: str, run: object, wait: Callable[[], None]) -> None:
        """Call ``wait`` before ``owner.method`` ends the run, in the thread that does."""
        if self._follower is None:
            self._follower = Follower(lambda _make_sink: None)
            self._follower.before(owner, method, self._on_end)
        # the run is held, so that no other object gets its id()
        self._waits[id(run)] = run, wait

    def _on_end(self, run: object, *_: Any, **__: Any) -> None:
        found = self._waits.pop(id(run), None)
        if found is not None:
            found[1]()
