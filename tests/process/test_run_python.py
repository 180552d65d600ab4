"""What each Python below ``memtrack run`` is given at its start, and how little that is."""

from __future__ import annotations

import compileall
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memtrack
from memtrack.cli import launcher

pytest.importorskip("typer")

ROOT = str(Path(memtrack.__file__).parents[1])

LOOK = """
import json, sys
print(json.dumps({
    "path": sys.path,
    "modules": sorted(sys.modules),
    "waiting": any(type(finder).__name__ == "_Watcher" for finder in sys.meta_path),
    "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
}))
"""

GIVEN = {"__future__", "memtrack", "memtrack.cli", "memtrack.cli.unasked", "memtrack.imports", "sitecustomize"}


def below(environ):
    """An environment as ``memtrack run`` makes it."""
    return {**launcher.with_autolog(environ, wanted=True), "MEMTRACK_RUN": "1:/nowhere"}


def look(environ, *flags, python=sys.executable, cwd=None):
    """What a Python finds at its start, and what it says on stderr."""
    done = subprocess.run(
        [python, *flags, "-c", LOOK], env=environ, cwd=cwd, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def plain(**more):
    """The environment of the test without a PYTHONPATH; the package can be imported if ``more`` says so."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


def test_run_gives_it_to_all_below(tmp_path):
    """Through a shell and to a worker that multiprocessing spawns; what is on the path otherwise stays there."""
    code = f"import multiprocessing as m, os\nif __name__ == '__main__':\n m.set_start_method('spawn')\n\
 p = m.Process(target=os.system, args=[{sys.executable + ' look.py'!r}]); p.start(); p.join()"
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, "-m", "memtrack", "run", "-q", "--", "sh", "-c", f"{sys.executable} main.py; exit $?"]
    environ = plain(PYTHONPATH=os.pathsep.join([ROOT, "/somewhere"]), MEMTRACK_DIR=str(tmp_path))
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["waiting"]
    assert found["path"][:3] == [str(tmp_path), ROOT, "/somewhere"]
    off = [*command[:4], "--no-autolog", *command[4:]]
    nested = launcher.with_autolog(environ, wanted=True)
    done = subprocess.run(off, env=nested, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert not json.loads(done.stdout)["waiting"]


@pytest.mark.parametrize("path", ["", "/somewhere", "/somewhere::/elsewhere:"])
def test_the_path_and_the_modules_are_as_without(path, tmp_path):
    """Nothing is on sys.path that would not be there, and nothing is loaded but what waits for trackers."""
    environ = plain(PYTHONPATH=os.pathsep.join([ROOT, *([path] if path else [])]))
    before, _ = look(environ, cwd=tmp_path)
    found, err = look(below(environ), cwd=tmp_path)
    assert found["path"] == before["path"]
    added = set(found["modules"]) - set(before["modules"])
    assert {"memtrack.cli.unasked", "memtrack.imports"} <= added <= GIVEN
    assert found["waiting"]
    assert not before["waiting"]
    assert err == ""


def test_an_environment_without_a_path():
    """What is added is all there is, and what is taken back leaves nothing."""
    on = launcher.with_autolog({"A": "1"}, wanted=True)
    assert on == {"A": "1", "PYTHONPATH": launcher.CHILD}
    assert launcher.with_autolog(on, wanted=True) == on
    assert launcher.with_autolog(on, wanted=False) == {"A": "1"}
    assert launcher.with_autolog({"PYTHONPATH": ""}, wanted=True) == {"PYTHONPATH": launcher.CHILD}


SITES = {
    "one that works": ("import sys\nsys.mine = __file__\n", ""),
    "one that fails": ("raise ValueError('mine')\n", "Error in sitecustomize"),
    "one that lacks a module": ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
}


@pytest.mark.parametrize("site", SITES)
def test_the_sitecustomize_that_is_hidden(site, tmp_path):
    """It is run all the same, and what it says is what it would have said."""
    source, said = SITES[site]
    (tmp_path / "sitecustomize.py").write_text(source)
    environ = plain(PYTHONPATH=os.pathsep.join([str(tmp_path), ROOT]))
    before, err_before = look(environ)
    found, err = look(below(environ))
    assert err == err_before
    assert said in err
    assert found["waiting"]
    if not said:
        assert found["sitecustomize"] == before["sitecustomize"] == str(tmp_path / "sitecustomize.py")


@pytest.mark.parametrize("flag", ["-I", "-E", "-S"])
def test_a_python_that_looks_at_nothing(flag, tmp_path):
    """Isolated, it is as it always was: no autolog, and no word about it."""
    environ = plain(PYTHONPATH=ROOT)
    before, _ = look(environ, flag, cwd=tmp_path)
    found, err = look(below(environ), flag, cwd=tmp_path)
    assert not found["waiting"]
    assert err == ""
    assert [entry for entry in found["path"] if entry != launcher.CHILD] == before["path"]


def pythons():
    """Interpreters without memtrack: the one that the environment was made of, and whatever old ones there are."""
    home = Path.home() / ".pyenv" / "versions"
    old = [next(iter(sorted(home.glob(f"{version}.*/bin/python"))), None) for version in ("2.7", "3.6")]
    return [sys._base_executable, *(str(path) for path in old if path is not None)]


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("python", pythons())
def test_a_python_without_memtrack(python, root, tmp_path):
    """Another environment or version, also one that cannot read memtrack though it finds it: nothing is said."""
    environ = below(plain(PYTHONPATH=ROOT) if root else plain())
    environ["PYTHONDONTWRITEBYTECODE"] = "1"
    found, err = look(environ, python=python, cwd=tmp_path)
    assert err == ""
    assert launcher.CHILD not in found["path"]
    assert found["waiting"] == (root and python == sys._base_executable)


def test_in_the_way_of_no_import(tmp_path):
    """A module that is waited for and is not there fails as ever."""
    code = "import mlflow"
    (tmp_path / "mlflow.py").write_text("raise ValueError('mine')\n")
    environ = below(plain(PYTHONPATH=os.pathsep.join([ROOT, str(tmp_path)])))
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=30)
    assert "ValueError: mine" in done.stderr
    assert "memtrack" not in done.stderr.replace(ROOT, "").partition("Traceback")[0]


COST = """
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))))
"""


@pytest.mark.alone
def test_it_costs_next_to_nothing():
    """A Python that imports no tracker starts less than 3 ms later and is less than 128 KiB larger."""
    # compiled, as it is when it was installed
    compileall.compile_dir(os.path.join(ROOT, "memtrack"), quiet=1)
    environ = plain(PYTHONPATH=ROOT)
    seconds, sizes = {}, {}
    for _ in range(15):
        for key, env in (("without", environ), ("with", below(environ))):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", COST], env=env, capture_output=True, text=True, timeout=30)
            seconds.setdefault(key, []).append(time.perf_counter() - start)
            sizes.setdefault(key, []).append(int(done.stdout))
    assert min(seconds["with"]) - min(seconds["without"]) < 0.003
    assert statistics.median(sizes["with"]) - statistics.median(sizes["without"]) < 128
