"""Being told of an import."""

from __future__ import annotations

import importlib
import sys
import zipfile

import pytest

from memtrack import imports, registry
from memtrack.cli import unasked


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and was not yet."""
    name = "memtrack_test_late"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)
    imports.forget(name)
    assert not any(type(finder).__name__ == "_Watcher" for finder in sys.meta_path)


def test_called_once_after_the_import(module):
    """When the call comes the module is complete; a second import or a reload does not call again."""
    seen = []
    imports.when_imported(module, lambda: seen.append(sys.modules[module].value))
    assert seen == []
    loaded = importlib.import_module(module)
    assert seen == [1]
    assert loaded.__spec__.origin.endswith(f"{module}.py")
    importlib.reload(loaded)
    assert seen == [1]


def test_forgotten(module):
    """Who changed his mind is not called."""
    seen = []
    imports.when_imported(module, lambda: seen.append(1))
    imports.forget(module)
    importlib.import_module(module)
    assert seen == []


def test_a_module_that_fails(module, tmp_path):
    """The error is the module's own, and nobody is told of an import that failed."""
    (tmp_path / f"{module}.py").write_text("raise ValueError('mine')\n")
    importlib.invalidate_caches()
    seen = []
    imports.when_imported(module, lambda: seen.append(1))
    with pytest.raises(ValueError, match="mine"):
        importlib.import_module(module)
    assert seen == []


def test_a_module_that_is_not_there(module):
    """The error is that of any missing module."""
    imports.when_imported("memtrack_test_absent", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="memtrack_test_absent"):
        importlib.import_module("memtrack_test_absent")
    imports.forget("memtrack_test_absent")


def test_one_loader_for_many_modules(tmp_path, monkeypatch):
    """A zip file has one: only the module that is waited for counts, though another is loaded first."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("memtrack_test_other.py", "")
        archive.writestr("memtrack_test_zipped.py", "import memtrack_test_other\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "all.zip"))
    seen = []
    imports.when_imported("memtrack_test_zipped", lambda: seen.append(sys.modules["memtrack_test_zipped"].value))
    importlib.import_module("memtrack_test_zipped")
    assert seen == [1]
    imports.forget("memtrack_test_zipped")


def test_what_run_waits_for():
    """The trackers and frameworks that autolog knows."""
    known = [*registry.AUTOLOG, *registry.FRAMEWORKS]
    assert {registry.MODULES.get(name, name): name for name in known} == unasked.FOLLOWED
