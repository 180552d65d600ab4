"""Artifacts as programs store them, whatever becomes of the file, of the program, of the process that packs, and of the
disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numpy")
pytest.importorskip("zstandard")
import numpy as np

import memtrack
from memtrack.artifacts.reading import Artifact
from memtrack.artifacts.uploader import current
from memtrack.errors import ArtifactError, ArtifactFormatError, ArtifactNotFoundError, SettingsError
from tests.artifact_lab import rows, safetensors, trained, weights

ROOT = Path(memtrack.__file__).parents[1]

STORE = """
import sys, memtrack
upload = memtrack.log_checkpoint(sys.argv[1], step=int(sys.argv[2]), name="model", to="store")
print("begun", flush=True)
print(upload.wait(float(sys.argv[3])), flush=True)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMTRACK_ARTIFACT_WAIT", "10")


def program(*arguments, code=STORE, **options):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def workers_of(pid):
    """The processes that pack for a process."""
    listed = subprocess.run(["pgrep", "-f", "-P", str(pid), "worker.py"], capture_output=True, text=True)
    return [int(word) for word in listed.stdout.split()]


def needed(store):
    """The packs that manifests in a folder list, and those that are there."""
    lists = set()
    for path in Path(store, "memtrack").rglob("*.mtz"):
        if path.parent.name != "packs":
            with open(path, "rb") as manifest:
                lists |= dict(Artifact(manifest, open).packs).keys()
    return lists, {path.stem for path in Path(store, "memtrack", "packs").iterdir()}


# -- as it should be --------------------------------------------------------------------------------------------------


def test_files_come_back_as_they_were(tmp_path):
    safetensors("m.safetensors", {"a": weights(1 << 20), "b": weights(1000)})
    Path("rows.csv").write_text("".join(rows(20_000)))
    os.chmod("rows.csv", 0o640)
    for path in ("m.safetensors", "rows.csv"):
        upload = memtrack.log_artifact(path, to="store")
        assert upload.wait(60), upload
        assert upload.done
        assert upload.bytes_done == upload.bytes_total == os.path.getsize(path)
        assert f"{path}: stored, " in str(upload)
        back = memtrack.restore(f"store/{path}", "back")
        assert Path(back).read_bytes() == Path(path).read_bytes()
    assert os.stat("back/rows.csv").st_mode & 0o777 == 0o640
    assert current().pending() == []


def test_the_run_has_a_text_on_what_there_is():
    for step in (1, 2):
        np.save("m.npy", weights(1 << 18, step))
        assert memtrack.log_checkpoint("m.npy", step=step, name="model", to="store").wait(60)
    assert current().finish(60)
    text = Path("store/memtrack/README.md").read_text()
    assert "| `model/step-00000001` | 1.0 | 0.9 | 1.20 |\n| `model/step-00000002` | 1.0 | 0.9 | 1.2" in text
    assert "| all 2 | 2.1 | 1.7 | 1.2" in text
    assert f"memtrack restore {os.getcwd()}/store/NAME" in text
    memtrack.delete_checkpoint("store/model/step-00000002")
    assert not os.path.exists("store/memtrack/README.md")
    assert memtrack.log_checkpoint("m.npy", step=3, name="model", to="store").wait(60)
    while not os.path.exists("store/memtrack/README.md"):
        time.sleep(0.01)
    assert "step-00000002" not in Path("store/memtrack/README.md").read_text()


def test_a_folder_and_one_file_of_it():
    Path("data/deep").mkdir(parents=True)
    Path("data/a.csv").write_text("".join(rows(1000)))
    Path("data/deep/b.bin").write_bytes(os.urandom(5000))
    os.symlink("a.csv", "data/link.csv")
    assert memtrack.log_artifact("data", to="store").wait(60)
    assert memtrack.restore("store/data", "back") == "back"
    for name in ("a.csv", "deep/b.bin", "link.csv"):
        assert Path("back", name).read_bytes() == Path("data", name).read_bytes()
    assert memtrack.restore("store/data", "one", file="deep/b.bin") == "one/deep/b.bin"
    assert [path.name for path in Path("one").rglob("*") if path.is_file()] == ["b.bin"]


def test_one_tensor_of_a_checkpoint():
    tensors = {"layer.weight": weights(1 << 20).reshape(1024, 1024), "layer.bias": weights(1024, 1)}
    safetensors("m.safetensors", tensors)
    assert memtrack.log_checkpoint("m.safetensors", step=1, to="store").wait(60)
    path = memtrack.restore("store/checkpoint", "back", tensor="layer.bias")
    raw = Path(path).read_bytes()
    assert raw.endswith(tensors["layer.bias"].tobytes())
    assert b'"layer.bias": {"dtype": "F32", "shape": [1024]' in raw
    with pytest.raises(ArtifactNotFoundError, match=r"no tensor 'nothing' in it; there are: layer\.weight"):
        memtrack.restore("store/checkpoint", "back", tensor="nothing")


@pytest.mark.parametrize("kind", ["arrays", "array", "sparse"])
def test_what_is_in_memory_is_saved_first(kind):
    state = {"a": weights(1 << 18), "b": np.arange(10)} if kind == "arrays" else weights(1 << 18)
    if kind == "sparse":
        sparse = pytest.importorskip("scipy.sparse")
        state = sparse.random(500, 400, 0.1, format="csr", random_state=0)
    assert memtrack.log_checkpoint(state, step=3, name="state", to="store").wait(60)
    path = memtrack.restore("store/state", "back")
    if kind == "array":
        assert np.array_equal(np.load(path), state)
    elif kind == "sparse":
        assert (sparse.load_npz(path) != state).nnz == 0
    else:
        with np.load(path) as back:
            assert all(np.array_equal(back[name], state[name]) for name in state)


def test_the_name_of_a_series_is_its_newest_and_steps_have_theirs():
    for step in (5, 40):
        np.save("m.npy", weights(1000, step))
        assert memtrack.log_checkpoint("m.npy", step=step, name="model", to="store").wait(60)
    newest = memtrack.restore("store/model", "back")
    assert np.array_equal(np.load(newest), weights(1000, 40))
    assert np.array_equal(np.load(memtrack.restore("store/model/step-00000005", "five")), weights(1000, 5))


def test_the_step_is_the_one_that_was_marked_last():
    with memtrack.start():
        memtrack.step(77)
        np.save("m.npy", weights(10))
        assert memtrack.log_checkpoint("m.npy", to="store").name == "checkpoint/step-00000077"
    assert current().finish(60)


# -- files that do not stay as they are -------------------------------------------------------------------------------


def test_the_file_may_be_removed_or_replaced_at_once():
    contents = {}
    for name in ("removed", "replaced"):
        safetensors(name, {"a": weights(4 << 20, len(name))})
        contents[name] = Path(name).read_bytes()
        upload = memtrack.log_artifact(name, to="store")
        if name == "removed":
            os.unlink(name)
        else:
            Path("other").write_bytes(b"another one")
            os.replace("other", name)
        assert upload.wait(60), upload
    for name, content in contents.items():
        assert Path(memtrack.restore(f"store/{name}", "back")).read_bytes() == content


def test_on_another_file_system_the_file_is_held_open(tmp_path):
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system")
    path = Path("/dev/shm", f"memtrack-test-{os.getpid()}")
    try:
        path.write_bytes(content := os.urandom(3 << 20))
        upload = memtrack.log_artifact(path, to="store", name="it")
    finally:
        path.unlink()
    assert upload.wait(60), upload
    back = memtrack.restore("store/it", "back")
    assert Path(back).read_bytes() == content


# -- deleting ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_the_middle_goes_and_those_after_it_stay():
    model, contents = weights(1 << 18), {}
    for step in (1, 2, 3):
        np.save("m.npy", model)
        contents[step] = Path("m.npy").read_bytes()
        assert memtrack.log_checkpoint("m.npy", step=step, name="model", to="store").wait(60)
        model = trained(model, step)
    deleted = memtrack.delete_checkpoint("store/model/step-00000002")
    assert deleted.name == "model/step-00000002"
    assert deleted.freed_bytes == 0
    assert deleted.kept_bytes > 0
    assert deleted.needed_by == ("model/step-00000001", "model/step-00000003")
    with pytest.raises(ArtifactNotFoundError, match="there are: model/step-00000001, model/step-00000003"):
        memtrack.restore("store/model/step-00000002")
    for step in (1, 3):
        back = memtrack.restore(f"store/model/step-{step:08d}", "back")
        assert Path(back).read_bytes() == contents[step]
    last = memtrack.delete_checkpoint("store/model/step-00000003")
    assert last.freed_bytes > 0
    lists, there = needed("store")
    assert lists == there, "nothing is left that nobody needs"


def test_what_somebody_has_deleted_is_stored_again():
    """Also if this process has been told before that the store has it."""
    np.save("m.npy", weights(1 << 18))
    assert memtrack.log_artifact("m.npy", to="store", name="first").wait(60)
    for pack in Path("store/memtrack/packs").iterdir():
        pack.unlink()
    os.unlink("store/memtrack/first.mtz")
    assert memtrack.log_artifact("m.npy", to="store", name="second").wait(60)
    assert Path(memtrack.restore("store/second", "back")).read_bytes() == Path("m.npy").read_bytes()


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: memtrack.log_artifact("none"), ArtifactError, "cannot store .*none: No such file or directory"),
        (lambda: memtrack.log_artifact("fifo"), ArtifactError, "neither a file nor a folder"),
        (lambda: memtrack.log_artifact("empty"), ArtifactError, "there is no file in it"),
        (lambda: memtrack.log_artifact("f", name="../f"), SettingsError, r"name='\.\./f': give a name such as"),
        (lambda: memtrack.log_artifact("f", name="packs"), SettingsError, "name='packs'"),
        (lambda: memtrack.log_artifact("f", compress="best"), SettingsError, "compress='best': give 'auto', 'max' or"),
        (lambda: memtrack.log_artifact("f", base="first"), SettingsError, "base='first': give 'auto' or 'off'"),
        (
            lambda: memtrack.log_artifact("f", to=7),  # type: ignore[arg-type]
            SettingsError,
            "to=7: give 'mlflow', 'wandb', 'comet', or a folder",
        ),
        (lambda: memtrack.log_artifact("f", to="mlflow"), ArtifactError, "no run of it is active in this process"),
        (lambda: memtrack.log_checkpoint("f", step=-1), SettingsError, "step=-1: give the number of a step"),
        (lambda: memtrack.log_checkpoint(3), SettingsError, "state='int': give a path, numpy arrays"),
        (lambda: memtrack.restore("nowhere/f"), ArtifactNotFoundError, "there is no artifact nowhere/f"),
        (lambda: memtrack.restore("mlflow:"), SettingsError, "give mlflow:RUN/NAME"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(call, error, text, tmp_path):
    Path("f").write_text("text")
    os.mkfifo("fifo")
    os.mkdir("empty")
    with pytest.raises(error, match=text):
        call()
    assert list(tmp_path.rglob("job-*")) == []


def test_an_artifact_that_is_too_large_is_refused_before_anything_is_written():
    Path("f").write_bytes(os.urandom(10_000))
    assert memtrack.log_artifact("f", to="store").wait(60)
    with pytest.raises(ArtifactError, match="it comes to 10000 bytes, and max_bytes=9999"):
        memtrack.restore("store/f", "back", max_bytes=9999)
    assert not os.path.exists("back")


def test_a_pack_that_is_missing_or_damaged_names_itself_and_what_is_lost():
    os.mkdir("two")
    for name in ("a.bin", "b.bin"):
        Path("two", name).write_bytes(os.urandom(20 << 20))
    assert memtrack.log_artifact("two", to="store").wait(60)
    packs = sorted(Path("store/memtrack/packs").iterdir(), key=os.path.getmtime)
    assert len(packs) == 2
    raw = bytearray(packs[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    packs[1].unlink()
    packs[1].write_bytes(raw)
    with pytest.raises(
        ArtifactFormatError, match=rf"b\.bin: pack {packs[1].stem}\.mtz is damaged.*lost with it: b\.bin"
    ):
        memtrack.restore("store/two", "back")
    assert Path("back/a.bin").read_bytes() == Path("two/a.bin").read_bytes()
    assert sorted(os.listdir("back")) == ["a.bin"]
    packs[0].unlink()
    with pytest.raises(
        ArtifactFormatError, match=rf"a\.bin: pack {packs[0].stem}\.mtz is missing; lost with it: a\.bin"
    ):
        memtrack.restore("store/two", "back2")


# -- kills ------------------------------------------------------------------------------------------------------------


def kill_and_finish(moments, *, seed):
    """Kill programs that store, their packing processes, or both, and let one finish; nothing is there twice, nothing
    is missing."""
    randomness = random.Random(seed)
    model = weights(9 << 20)  # two packs of it, or one of differences
    for step, kills in enumerate(moments):
        np.save("m.npy", model)
        for _ in range(kills):
            storing = program("m.npy", step, 60, start_new_session=True)
            storing.stdout.readline()
            time.sleep(randomness.uniform(0.0, 0.8))
            victims = randomness.choice(["program", "worker", "both"])
            for pid in workers_of(storing.pid) if victims != "program" else []:
                os.kill(pid, signal.SIGKILL)
            if victims != "worker":
                storing.kill()
            out, _ = storing.communicate(timeout=60)
            assert victims != "worker" or "True" in out
        out, err = program("m.npy", step, 60).communicate(timeout=60)
        assert "True" in out, err
        assert Path(memtrack.restore("store/model", "back")).read_bytes() == Path("m.npy").read_bytes()
        model = trained(model, step)
    lists, there = needed("store")
    assert lists == there
    assert len(list(Path("store/memtrack/model").iterdir())) == len(moments)


def test_a_second_call_finishes_what_was_killed():
    kill_and_finish([3, 2], seed=1)


@pytest.mark.slow
def test_a_hundred_kills():
    kill_and_finish([20] * 5, seed=time.time_ns())


# -- the end of the program -------------------------------------------------------------------------------------------


def test_what_is_not_stored_at_the_end_is_stored_by_sync(monkeypatch):
    pytest.importorskip("typer")
    np.save("m.npy", weights(12 << 20))
    monkeypatch.setenv("MEMTRACK_ARTIFACT_WAIT", "0.05")
    out, err = program("m.npy", 1, 0.05).communicate(timeout=60)
    assert out.split() == ["begun", "False"]
    assert "model/step-00000001 is not stored yet; log it once more, or run: memtrack sync" in err
    os.unlink("m.npy")
    synced = program("sync", code="import sys; from memtrack.__main__ import main; main()")
    out, err = synced.communicate(timeout=60)
    assert "model/step-00000001: stored" in out, f"{out}\n{err}"
    assert synced.returncode == 0
    back = memtrack.restore("store/model", "back")
    assert np.array_equal(np.load(back), weights(12 << 20))
    assert list(Path(".").rglob("job-*")) == []


def test_the_end_of_a_program_waits_until_it_is_stored():
    np.save("m.npy", weights(4 << 20))
    code = "import sys, memtrack; memtrack.log_checkpoint(sys.argv[1], step=1, name='model', to='store')"
    storing = program("m.npy", code=code)
    assert storing.communicate(timeout=60) == ("", "")
    assert storing.returncode == 0
    assert memtrack.restore("store/model", "back")


def test_a_fork_does_not_store_what_is_its_parents():
    code = """
import os, memtrack
upload = memtrack.log_artifact("m.npy", to="store")
pid = os.fork()
if not pid:
    from memtrack.artifacts.uploader import current
    assert current().pending() == []
    assert memtrack.log_artifact("m.npy", to="store", name="child.npy").wait(60)
    os._exit(0)
print(os.waitpid(pid, 0)[1], upload.wait(60))
"""
    np.save("m.npy", weights(1 << 20))
    assert program(code=code).communicate(timeout=60) == ("0 True\n", "")
    assert memtrack.restore("store/m.npy", "back")
    assert memtrack.restore("store/child.npy", "back")


def test_a_disk_that_is_full_is_told_once_and_tried_again_when_there_is_room(tmp_path):
    """In a mount namespace: a disk of 8 MiB, with a file on it that goes after a while."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, to make namespaces")
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    code = """
import logging, os, threading, memtrack
logging.basicConfig(format="%(message)s")
fd = os.open("disk/fill", os.O_CREAT | os.O_WRONLY)
try:
    while True:
        os.write(fd, bytes(4096))
except OSError:
    os.close(fd)
os.environ["MEMTRACK_DIR"] = "recordings"
upload = memtrack.log_artifact("m.npy", to="disk/store")
print(upload.wait(3), upload.error, flush=True)
os.unlink("disk/fill")
print(upload.wait(30), upload.error)
"""
    np.save("m.npy", weights(1 << 20))
    os.mkdir("disk")
    mounted = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=8m none {tmp_path}/disk && exec "$@"', "sh"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*mounted, sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    first, second = done.stdout.splitlines()
    assert first.startswith("False cannot read or write")
    assert "No space left" in first
    assert second == "True "
    assert done.stderr.count("No space left") == 1
