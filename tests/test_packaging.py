"""What is shipped, and what an import costs: guards for the layout in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memtrack

ROOT = Path(__file__).resolve().parents[1]
INTEGRATIONS = sorted(p for p in (ROOT / "integrations").iterdir() if p.is_dir() and p.name != "__pycache__")
MODULES = sorted(p for top in ("memtrack", "integrations") for p in (ROOT / top).rglob("*.py"))

FOLDERS = {".ci", "examples", "integrations", "memtrack", "tests"}
FILES = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}

MAX_LINES = 400

# Set where only the wheel is installed and pytest runs with `-o pythonpath=`.
INSTALLED = bool(os.environ.get("MEMTRACK_TEST_INSTALLED"))


def run(code: str, *flags: str) -> set[str]:
    """Run code in a fresh interpreter; the names of the modules that it loaded."""
    roots = [str(Path(memtrack.__file__).parents[1]), *([] if INSTALLED else [str(ROOT / "integrations")])]
    code = f"import sys; sys.path[:0] = {roots!r}; before = {{*sys.modules}}\n{code}\nprint(*{{*sys.modules}} - before)"
    command = [sys.executable, "-I", *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_top_level_is_fixed() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    paths = [Path(line) for line in listed.splitlines()]
    assert {p.parts[0] for p in paths if len(p.parts) > 1} <= FOLDERS
    assert {p.name for p in paths if len(p.parts) == 1} <= FILES


@pytest.mark.parametrize("folder", INTEGRATIONS, ids=lambda p: p.name)
def test_integration_folder(folder: Path) -> None:
    assert folder.name.startswith("memtrack_"), "another name would shadow the library it integrates"
    assert (folder / "__init__.py").is_file()
    assert (folder / "py.typed").is_file()
    module = importlib.import_module(folder.name)
    assert module.__all__ == sorted(module.__all__)


def test_integrations_is_a_source_root_not_a_package() -> None:
    assert not (ROOT / "integrations" / "__init__.py").exists()
    assert [p.name for p in INTEGRATIONS], "an empty source root would make the wheel lose its integrations"


def test_every_integration_is_under_the_import_contracts() -> None:
    roots = re.search(r"^root_packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert roots
    for folder in INTEGRATIONS:
        assert f'"{folder.name}"' in roots[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_package_folder_has_an_init() -> None:
    """Without one the folder is a namespace package: mypy and import-linter would pass it over in silence."""
    folders = {p.parent for p in MODULES}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_version_is_that_of_the_distribution() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert memtrack.__version__ == declared[1]


def test_import_loads_nothing_of_others() -> None:
    loaded = {name.partition(".")[0] for name in run("import memtrack")}
    assert loaded - set(sys.stdlib_module_names) == {"memtrack"}


def test_import_loads_no_slow_part_of_the_standard_library() -> None:
    assert not run("import memtrack", "-S") & {"asyncio", "importlib.metadata", "json", "logging", "subprocess"}


def test_import_loads_no_part_of_memtrack() -> None:
    """Names are looked up on first use: a script that never monitors pays for an empty shell."""
    assert {name for name in run("import memtrack") if name.startswith("memtrack.")} == set()


@pytest.mark.parametrize("package", ["agent", "collectors", "recording", "sampling"])
def test_agent_parts_import_without_site_packages(package: str) -> None:
    """The agent runs under -I -S, where a module that needs more than the standard library cannot be imported."""
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in sorted((ROOT / "memtrack" / package).glob("*.py"))
        if p.stem not in {"__init__", "__main__", "psutil_"}
    ]
    run("".join(f"import {name}\n" for name in names), "-S")


def test_the_tested_package_is_the_one_meant() -> None:
    installed = "site-packages" in memtrack.__file__
    assert installed == INSTALLED, memtrack.__file__
