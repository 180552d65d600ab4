"""restore.py, as it travels with artifacts, where there is no memtrack: with numpy and any one zstd."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys

import pytest

pytest.importorskip("zstandard")

from memtrack.artifacts.decoding import content_size
from memtrack.artifacts.script import script
from tests.artifact_lab import content, forged_store, write_container
from tests.unit.test_artifact_hostile import FRAMES, NAMES, one_block, tables

ZSTDS = ["zstandard", "backports.zstd", "program"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that has numpy, and beside it one folder for each zstd."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, "numpy"], check=True)
    for name in ("zstandard", "backports.zstd"):
        if name != "backports.zstd" or sys.version_info < (3, 14):  # which has it in its library
            subprocess.run([*install, "--target", folder / name, name], check=True)
    (folder / "program").mkdir()
    if shutil.which("zstd"):
        (folder / "program" / "zstd").symlink_to(shutil.which("zstd"))
    (folder / "none").mkdir()
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store = forged_store(tmp_path_factory.mktemp("whole"))
    (store.folder / "memtrack" / "restore.py").write_text(script())
    return store


class Restored:
    """What came of the script: exit status, what it said, and the files."""

    def __init__(self, python, zstd, store, *arguments):
        with_it = python.parents[1] / zstd
        env = {"PATH": str(with_it), "PYTHONPATH": str(with_it), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [python, "memtrack/restore.py", "memtrack/data.mtz", "--to", "to", *arguments]
        with subprocess.Popen(
            command, cwd=store.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            self.out, self.err = process.communicate(timeout=60)
            self.status = process.returncode
        self.files = content(store.folder / "to")


@pytest.fixture(params=ZSTDS)
def zstd(request, python):
    if request.param == "program" and not shutil.which("zstd"):
        pytest.skip("there is no program zstd")
    return request.param


def test_everything_is_restored(python, zstd, whole, tmp_path):
    store = whole.copy(tmp_path / "store")
    found = Restored(python, zstd, store)
    assert (found.status, found.err) == (0, "")
    assert found.files == whole.content
    assert sorted(found.out.split()) == ["to/deep/m.npy", "to/empty", "to/rows.csv"]
    assert stat.S_IMODE(os.stat(store.folder / "to" / "rows.csv").st_mode) == 0o600


def test_one_file_and_the_list(python, zstd, whole, tmp_path):
    store = whole.copy(tmp_path / "store")
    found = Restored(python, zstd, store, "--list")
    assert (found.status, found.files) == (0, {})
    assert [line.split() for line in found.out.splitlines()] == [
        [f"{len(data):,}", name] for name, data in sorted(whole.content.items())
    ]
    found = Restored(python, zstd, store, "--file", "rows.csv")
    assert found.files == {"rows.csv": whole.content["rows.csv"]}
    found = Restored(python, zstd, store, "--file", "nowhere")
    assert (found.status, found.err) == (1, "there is no file 'nowhere'; --list shows what there is\n")


def test_without_a_zstd_it_tells_what_to_install(python, whole, tmp_path):
    if sys.version_info >= (3, 14):
        pytest.skip("the standard library has one")
    found = Restored(python, "none", whole.copy(tmp_path / "store"))
    assert (found.status, found.out, found.files) == (1, "", {})
    assert found.err == "no zstd was found. Install one: pip install zstandard\n"


def test_what_is_lost_is_named_and_the_rest_restored(python, zstd, whole, tmp_path):
    store = whole.copy(tmp_path / "store")
    for path in store.packs_of():
        path.write_bytes(path.read_bytes()[:-1])
    found = Restored(python, zstd, store)
    assert found.status == 1
    assert found.files == {"empty": b""}
    lines = found.err.splitlines()
    assert [line.split(": pack ")[0] for line in lines] == ["deep/m.npy", "rows.csv"]
    assert all("is damaged: its size is not what the manifest says; lost with it: " in line for line in lines)


@pytest.mark.parametrize("name", FRAMES)
def test_frames(python, zstd, whole, tmp_path, name):
    """Of whatever zstd, the same is refused."""
    store = whole.copy(tmp_path / "store")
    one_block(store, [FRAMES[name]])
    refused(python, zstd, store)


@pytest.mark.parametrize("name", NAMES[:12], ids=lambda name: ascii(name)[:12])
def test_names(python, whole, tmp_path, name):
    store = whole.copy(tmp_path / "store")
    store.change(store.manifest(), lambda table: table["files"][0].update(path=name))
    refused(python, "zstandard", store)


def test_a_link_that_leads_out(python, whole, tmp_path):
    store = whole.copy(tmp_path / "store")
    (store.folder / "to").mkdir()
    (store.folder / "to" / "deep").symlink_to(tmp_path / "outside")
    found = Restored(python, "zstandard", store)
    assert "a link there leads out of it" in found.err
    assert sorted(found.files) == ["empty", "rows.csv"]
    assert not (tmp_path / "outside").exists()


def test_memory_is_bounded(python, zstd, whole, tmp_path):
    """Bombs take no more than what is read anyway, in the program zstd neither."""
    import zstandard

    store = whole.copy(tmp_path / "store")
    usual = peak_mib(python, zstd, store)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    small = bomb[:4] + b"\x80\x58" + (4096).to_bytes(4, "little") + bomb[10:]
    assert content_size(small) == 4096
    for frame in (bomb, small):
        one_block(store, [frame])
        assert peak_mib(python, zstd, store) < usual + 32
    for text in tables():
        write_container(store.manifest(), b"", text)
        assert peak_mib(python, zstd, store) < usual + 32


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def peak_mib(python, zstd, store):
    """The most memory that restoring takes. Of a process that this large one had started, it would be this one's."""
    with_it = python.parents[1] / zstd
    env = {"PATH": str(with_it), "PYTHONPATH": str(with_it)}
    command = [sys.executable, "-c", PEAK, python, "memtrack/restore.py", "memtrack/data.mtz", "--to", "to"]
    found = subprocess.run(command, cwd=store.folder, env=env, capture_output=True, text=True, check=True)
    return float(found.stdout)


def refused(python, zstd, store):
    """It is one line, and there is no file."""
    before = content(store.folder)
    found = Restored(python, zstd, store)
    assert (found.status, found.files) == (1, {})
    assert found.err.count("\n") == 1
    assert found.err.strip().isprintable()
    assert content(store.folder) == before
