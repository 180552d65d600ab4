"""The folder of the recordings: private, nobody else's, and another one where the default cannot be made."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from memtrack import config
from memtrack.config import Settings
from memtrack.errors import RecordingError
from memtrack.recording import layout
from memtrack.recording.writer import create

NOBODY, SOMEBODY = 65534, 4321

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


@pytest.fixture
def shared():
    """A folder that every user can get at, unlike ``tmp_path``."""
    path = Path(tempfile.mkdtemp(prefix="memtrack-test-"))
    path.chmod(0o777 | stat.S_ISVTX)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def as_nobody(run_child, shared):
    """Runs code as a user without rights, in a folder; gives what it printed.

    What is needed is imported before: that user may have no right to read this interpreter's library.
    """

    def run(code, cwd=shared, before=""):
        child = run_child(
            f"import encodings.idna, logging, os, pwd, tempfile\n{before}\n"
            "from memtrack import config, notices\nfrom memtrack.config import Settings\n"
            "from memtrack.errors import RecordingError\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "def attempt(directory):\n"
            "    try:\n        return config.make_directory(Settings(directory=directory))\n"
            f"    except RecordingError as exc:\n        return f'refused: {{exc}}'\n{code}",
            cwd=cwd,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(shared)},
            stderr=-2,
        )
        out, _ = child.communicate(timeout=60)
        assert child.returncode == 0, out
        return out.strip()

    return run


def folder(path, owner=0, mode=0o700):
    """Make a folder of somebody's."""
    path.mkdir()
    os.chown(path, owner, owner)
    path.chmod(mode)
    return path


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# -- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_whatever_the_umask(tmp_path, umask):
    """The folder is 0700 and a recording 0600; nobody else may write to what was made on the way there."""
    before = os.umask(umask)
    try:
        if umask == 0o777:  # what leads there would be closed even to its owner
            tmp_path.joinpath("way").mkdir(0o700)
            tmp_path.joinpath("way").chmod(0o700)
        path = config.make_directory(Settings(directory=str(tmp_path / "way" / "recordings")))
        create(f"{path}/a.mtk", layout.MIN_SIZE, {})
    finally:
        os.umask(before)
    assert (mode_of(path), mode_of(f"{path}/a.mtk")) == (0o700, 0o600)
    assert mode_of(tmp_path / "way") & 0o022 == 0


def test_lax_modes(tmp_path, monkeypatch):
    """The folder that memtrack names is made private again; one that the user names is left as it is."""
    monkeypatch.chdir(tmp_path)
    for name, expected in ((".memtrack", 0o700), ("chosen", 0o755)):
        folder(tmp_path / name, os.geteuid(), 0o755)
        config.make_directory(Settings(directory=name))
        assert mode_of(tmp_path / name) == expected


def test_recording_is_not_made_through_a_link(tmp_path):
    """A link that waits under the name of the new recording is an error, and what it points to is not made."""
    (tmp_path / "a.mtk").symlink_to(tmp_path / "target")
    with pytest.raises(RecordingError, match="cannot make the recording"):
        create(str(tmp_path / "a.mtk"), layout.MIN_SIZE, {})
    assert not (tmp_path / "target").exists()


# -- other people's folders -------------------------------------------------------------------------------------------


@needs_root
def test_folder_of_somebody_else(shared, as_nobody):
    """It is refused, by root too, and the error names path, owner and what to do. One of root's is fine."""
    theirs = folder(shared / "theirs", SOMEBODY, 0o777 | stat.S_ISVTX)
    for said in (as_nobody(f"print(attempt({str(theirs)!r}))"), _refusal(theirs)):
        assert f"{theirs} belongs to user {SOMEBODY}" in said
        assert said.endswith("Choose another one with MEMTRACK_DIR.")
        assert len(said.splitlines()) == 1
    group = shared / "group"
    group.mkdir()
    os.chown(group, 0, NOBODY)
    group.chmod(0o770)
    assert as_nobody(f"print(attempt({str(group)!r}))") == str(group)
    assert list(theirs.iterdir()) == list(group.iterdir()) == []


def _refusal(path):
    with pytest.raises(RecordingError) as caught:
        config.make_directory(Settings(directory=str(path)))
    return str(caught.value)


@needs_root
@pytest.mark.parametrize("owner", [0, NOBODY])
def test_folder_that_everybody_may_write_to(shared, as_nobody, owner):
    """It is refused, unless only owners may remove and rename what is in it."""
    path = folder(shared / "open", owner, 0o777)
    said = as_nobody(f"print(attempt({str(path)!r}))")
    assert f"everybody may write to the recordings folder {path}" in said
    assert f"chmod o-w {path}" in said
    path.chmod(0o777 | stat.S_ISVTX)
    assert as_nobody(f"print(attempt({str(path)!r}))") == str(path)


@needs_root
def test_links(shared, as_nobody):
    """A link is followed if it is the user's own or the folder's owner's, or if not everybody could put it there."""
    target = folder(shared / "target", NOBODY)
    drop = folder(shared / "drop", 0, 0o777 | stat.S_ISVTX)
    safe = folder(shared / "safe", SOMEBODY, 0o755)

    def link(name, owner, to=target):
        (shared / name).symlink_to(to)
        os.chown(shared / name, owner, owner, follow_symlinks=False)
        return str(shared / name)

    for path in (link("drop/own", NOBODY), link("drop/roots", 0), link("safe/theirs", SOMEBODY)):
        assert as_nobody(f"print(attempt({path!r}))") == path
    foreign = link("drop/foreign", SOMEBODY)
    relative = link("drop/relative", NOBODY, Path("../drop/foreign"))
    above = link("drop/above", SOMEBODY, shared)
    for path, culprit in ((foreign, foreign), (relative, foreign), (f"{above}/new", above)):
        said = as_nobody(f"print(attempt({path!r}))")
        assert f"{path} is reached over {culprit}, which is a link of user {SOMEBODY}" in said
    assert f"reached over {foreign}" in _refusal(foreign)
    loop = link("drop/loop", NOBODY, shared / "drop/loop")
    assert "Too many levels of symbolic links" in as_nobody(f"print(attempt({loop!r}))")
    assert sorted(path.name for path in shared.iterdir()) == ["drop", "safe", "target"]
    assert safe.exists()
    assert drop.exists()


# -- the folder that takes the place of the default one ---------------------------------------------------------------


@needs_root
def test_working_directory_that_is_read_only(shared, as_nobody):
    """Recordings go to the folder for temporary files then, with a warning; who looks for recordings finds them."""
    work = folder(shared / "work", 0, 0o755)
    code = "path = attempt('.memtrack')\nprint(path, oct(os.stat(path).st_mode)[-3:])\n"
    code += "print(attempt('.memtrack') == path == config.find_directory(Settings()))"
    place = shared / f"memtrack-{NOBODY}"
    *warnings, first, second = as_nobody(code, work).splitlines()
    assert (first, second) == (f"{place} 700", "True")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"memtrack cannot make the recordings folder {work}/.memtrack: Permission denied.")
    assert f"Recordings go to {place}" in warnings[0]
    assert as_nobody(code, work).splitlines()[1:] == [first, second]
    # the default counts again as soon as it is there; one that was chosen is never exchanged for another
    folder(work / ".memtrack", NOBODY)
    assert as_nobody("print(config.find_directory(Settings()), attempt('.memtrack'))", work) == " ".join(
        [f"{work}/.memtrack"] * 2
    )
    said = as_nobody(f"print(attempt({str(work / 'chosen')!r}))", work)
    assert said.startswith(f"refused: cannot make the recordings folder {work}/chosen: Permission denied")


@needs_root
@pytest.mark.parametrize("trap", ["folder", "link", "file"])
def test_somebody_waits_in_the_folder_for_temporary_files(shared, as_nobody, trap):
    """What another user has put under the name of the folder is not used, neither to write nor to read."""
    work = folder(shared / "work", 0, 0o755)
    place = shared / f"memtrack-{NOBODY}"
    if trap == "folder":
        folder(place, SOMEBODY, 0o777)
    elif trap == "link":
        place.symlink_to(folder(shared / "target", NOBODY))
        os.chown(place, SOMEBODY, SOMEBODY, follow_symlinks=False)
    else:
        place.touch()
    said = as_nobody("print(config.find_directory(Settings()))\nprint(attempt('.memtrack'))", work)
    assert said.splitlines()[0] == f"{work}/.memtrack"
    assert said.splitlines()[1].startswith("refused: ")
    assert "MEMTRACK_DIR" in said


def test_working_directory_that_was_removed(tmp_path, run_child):
    """Then, too, there is a place for recordings."""
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os\nfrom memtrack import config\nos.rmdir(os.getcwd())\n"
        "print(config.find_directory(config.Settings()))\nprint(config.make_directory(config.Settings()))"
    )
    child = run_child(code, cwd=gone, env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}, stderr=-2)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0, out
    place = tmp_path / f"memtrack-{os.geteuid()}"
    assert out.splitlines()[-2:] == [".memtrack", str(place)]
    assert f"cannot make the recordings folder .memtrack: No such file or directory. Recordings go to {place}" in out


def _run_as_nobody(command):
    """Exit status of a command that a user without rights runs."""
    try:
        return subprocess.run(command, user=NOBODY, cwd="/", capture_output=True).returncode
    except PermissionError:
        return 1


@needs_root
def test_monitoring_by_a_user_without_rights(shared, tmp_path, as_nobody):
    """All of it works where the working directory is read-only: the agent, the recording, its mode, and the reader."""
    pythons = [sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")]
    for python in filter(None, pythons):
        check = "import sys; sys.exit(sys.version_info < (3, 10))"
        if os.path.exists(python) and not _run_as_nobody([python, "-I", "-S", "-c", check]):
            break
    else:
        pytest.skip("needs a Python that every user may run")
    before = f"import memtrack, sys\nwith memtrack.start(directory={str(tmp_path / 'before')!r}): pass"
    code = (
        f"sys.executable = {python!r}\n"
        "with memtrack.start() as monitor:\n    assert monitor.wait_ready()\n"
        "from memtrack.recording.reader import RecordingReader\n"
        "print(RecordingReader(monitor.path).head().windows > 0, oct(os.stat(monitor.path).st_mode)[-3:])"
    )
    *_, last = as_nobody(code, folder(shared / "work", 0, 0o755), before).splitlines()
    assert last == "True 600"
    assert len(list((shared / f"memtrack-{NOBODY}").glob("*.mtk"))) == 1
