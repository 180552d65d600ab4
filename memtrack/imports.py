"""Being told when a module is imported, without importing it. A tenth of the memory of a library that does the same.

``memtrack run`` loads this at the start of every Python below it, which is why it imports next to nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Call = Callable[[], None]


class _Watcher:
    """A finder that finds nothing itself: it lets the others look, and has the loader call back once it is done."""

    def __init__(self) -> None:
        self.waiting: dict[str, Call] = {}
        self._looking: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.waiting or name in self._looking:
            return None
        self._looking.add(name)
        try:
            spec = self._ask_others(name, path, target)
        finally:
            self._looking.discard(name)
        if spec is not None and spec.loader is not None:
            self._watch(name, spec.loader)
        return spec

    def _ask_others(self, name: str, path: object, target: object) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            look = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or look is None else look(name, path, target)
            if spec is not None:
                return spec
        return None

    def _watch(self, name: str, loader: object) -> None:
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def exec_module(module: ModuleType) -> None:
            load(module)
            # a loader may be that of many modules, as of all in a zip file
            call = self.waiting.pop(name, None) if module.__name__ == name else None
            if call is not None:
                call()

        try:
            loader.exec_module = exec_module  # type: ignore[attr-defined]
        except AttributeError:
            pass  # a loader of a kind that cannot be told anything


_watcher = _Watcher()


def when_imported(name: str, call: Call) -> None:
    """Call ``call`` once, right after the module ``name`` was imported. It must not raise."""
    _watcher.waiting[name] = call
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def forget(name: str) -> None:
    """Do not call."""
    _watcher.waiting.pop(name, None)
    if not _watcher.waiting and _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
