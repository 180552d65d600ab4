"""The command line without its processes: what each verb prints, and with which status it exits."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner

import memtrack
from memtrack import config, metrics
from memtrack.cli import checks, launcher
from memtrack.cli.app import app
from memtrack.cli.attach import check
from memtrack.collectors.procfs import program_name
from memtrack.config import Settings
from memtrack.errors import MonitorError
from memtrack.recording import layout
from memtrack.recording.marks import MarkWriter
from memtrack.recording.writer import RecordingWriter, create
from memtrack.sampling.window import NOWHERE, Row

SECOND_NS = 10**9


@pytest.fixture
def invoke(monkeypatch):
    """Run the command line in this process, on a wide terminal without colours."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    # click before 8.2 mixes stdout and stderr unless told otherwise, and later ones cannot be told
    separate: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return lambda *arguments: CliRunner(**separate).invoke(app, list(arguments))


@pytest.fixture
def recording(tmp_path):
    """A recording of three windows."""
    path = str(tmp_path / "run.mtk")
    fields = {"size": str(layout.MIN_SIZE), "pid": "4242", "start_ticks": "1", "boot_id": "", "program": "train.py"}
    create(path, layout.MIN_SIZE, {**fields, "wall_ns": str(1_700_000_000 * SECOND_NS), "mono_ns": "0"})
    marks, writer = MarkWriter(path), RecordingWriter(path)
    for number in range(3):
        row = Row(number, number * SECOND_NS)
        row.add(metrics.RSS, 100.0 + number, row.start_ns, NOWHERE, 1.0)
        row.add(metrics.ANON, 50.0, row.start_ns, NOWHERE, 1.0)
        row.end_ns, row.end_wall_ns = row.start_ns + SECOND_NS, (1_700_000_001 + number) * SECOND_NS
        writer.append(row)
    head = layout.Head()
    head.state, head.mono_ns = layout.ENDED, 3 * SECOND_NS
    writer.publish(head)
    writer.close()
    marks.close()
    return path


# -- the whole ------------------------------------------------------------------------------------------------------


def test_help_names_every_verb(invoke):
    """Help lists the verbs, and so does the bare command."""
    for arguments in (["--help"], []):
        text = invoke(*arguments).output
        assert all(f" {verb} " in text for verb in ("run", "attach", "ls", "report", "doctor"))


def test_version(invoke):
    """The version is that of the package."""
    assert invoke("--version").output == f"memtrack {memtrack.__version__}\n"


@pytest.mark.parametrize("verb", ["run", "attach", "ls", "report", "doctor"])
def test_every_verb_has_help(invoke, verb):
    """Each verb explains itself, and each of its options."""
    done = invoke(verb, "--help")
    assert done.exit_code == 0
    assert f"memtrack {verb}" in done.output or f" {verb} " in done.output


def test_our_errors_are_one_line_and_status_2(invoke):
    """What memtrack raises on purpose is no traceback."""
    done = invoke("run", "--interval", "soon", "--", "true")
    assert done.exit_code == 2
    assert done.stderr.startswith("memtrack: --interval='soon': give a duration")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_variable_is_named(invoke, monkeypatch):
    """A setting from the environment is complained about under its own name."""
    monkeypatch.setenv("MEMTRACK_INTERVAL", "soon")
    done = invoke("run", "--", "true")
    assert done.exit_code == 2
    assert "MEMTRACK_INTERVAL='soon'" in done.stderr


def run_without(module):
    """``python -m memtrack`` where ``module`` cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['memtrack', 'ls']\nimport runpy\n"
    code += "runpy.run_module('memtrack', run_name='__main__')"
    root = str(Path(memtrack.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(module):
    """One line on stderr that ends with the command, status 1, no traceback."""
    done = run_without(module)
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'memtrack[cli]'\n")
    assert done.stderr.count("\n") == 1


def test_a_broken_installation_is_not_called_a_missing_extra():
    """If a module of memtrack itself is gone, installing an extra does not help."""
    assert "ModuleNotFoundError" in run_without("memtrack.cli.app").stderr


# -- ls and report --------------------------------------------------------------------------------------------------


def test_ls_lists_good_and_damaged(invoke, recording, tmp_path):
    """A damaged file is one row among the others."""
    (tmp_path / "broken.mtk").write_bytes(b"nonsense" * 1000)
    done = invoke("ls", "--directory", str(tmp_path))
    assert done.exit_code == 0
    assert "train.py (4242)" in done.output
    assert "102.0 MiB" in done.output
    assert "not a memtrack recording" in done.output


def test_ls_of_an_empty_folder(invoke, tmp_path):
    """Nothing is no error, and the folder is named."""
    done = invoke("ls", "-d", str(tmp_path / "none"))
    assert done.exit_code == 0
    assert done.output == f"no recordings in {tmp_path / 'none'}\n"


def test_the_folder_is_that_of_the_environment(invoke, recording):
    """Without an option the folder is MEMTRACK_DIR, which the tests set to their own."""
    assert "train.py" in invoke("ls").output


@pytest.mark.parametrize("run", [[], ["run"], ["run.mtk"], ["PATH"]])
def test_report_finds_its_recording(invoke, recording, run):
    """The newest, or by name, or by path."""
    done = invoke("report", *[recording if word == "PATH" else word for word in run])
    assert done.exit_code == 0
    assert "peak 102.0 MiB" in done.output
    assert "process/rss_mib" in done.output
    assert "process/anon_mib" not in done.output


def test_report_all(invoke, recording):
    """--all shows what is not charted by default."""
    assert "process/anon_mib" in invoke("report", "--all").output


def test_report_without_a_recording(invoke, tmp_path):
    """The error says how to make one."""
    done = invoke("report")
    assert done.exit_code == 2
    assert done.stderr.endswith("memtrack run -- CMD\n")


def test_report_json_and_png_together(invoke, recording, tmp_path):
    """stdout holds the JSON alone; the picture goes to its file."""
    pytest.importorskip("matplotlib")
    done = invoke("report", "--json", "--png", str(tmp_path / "out.png"))
    assert done.exit_code == 0
    assert json.loads(done.stdout)["peak"]["rss_mib"] == 102.0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# -- run and attach -------------------------------------------------------------------------------------------------


def test_run_needs_a_command(invoke):
    """Without one it is a usage error."""
    assert invoke("run").exit_code == 2


def test_child_environment_is_left_alone_without_options():
    """What was not given as an option is not touched."""
    environ = {"MEMTRACK_INTERVAL": "5", "A": "b"}
    assert launcher.child_environment(config.resolve({}, environ), [], environ) == environ


def test_child_environment_carries_the_options():
    """An option wins over the variable, also when it says the default; the folder becomes absolute."""
    environ = {"MEMTRACK_INTERVAL": "5", "MEMTRACK_DIR": "x", "MEMTRACK_TICK": "1", "A": "b"}
    given = {"interval": "1", "directory": "y", "recording_size": "8MiB"}
    found = launcher.child_environment(config.resolve(given, environ), given, environ)
    wanted = {"A": "b", "MEMTRACK_TICK": "1", "MEMTRACK_DIR": os.path.abspath("y")}
    assert found == {**wanted, "MEMTRACK_RECORDING_SIZE": str(8 << 20)}
    assert config.resolve({}, found).interval_s == 1.0


def test_attach_to_nothing(invoke):
    """A pid that is not in use is said so."""
    done = invoke("attach", str(2**22 + 1))
    assert done.exit_code == 2
    assert done.stderr == f"memtrack: there is no process {2**22 + 1}\n"


def test_attach_while_switched_off(invoke, monkeypatch):
    """MEMTRACK_DISABLE leaves nothing to do."""
    monkeypatch.setenv("MEMTRACK_DISABLE", "1")
    assert "MEMTRACK_DISABLE" in invoke("attach", str(os.getpid())).stderr


def test_attach_to_a_process_of_somebody_else(tmp_path, monkeypatch):
    """Only its owner and root can measure a process; the error names the owner."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("VmRSS:\t 10 kB\n")
    check(7, str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(MonitorError, match="not permitted to measure process 7: it belongs to "):
        check(7, str(tmp_path))


def test_attach_to_what_has_no_memory(tmp_path):
    """Kernel threads and zombies have none."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tkthreadd\n")
    with pytest.raises(MonitorError, match="no memory to measure"):
        check(7, str(tmp_path))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/usr/bin/python3.11", "-u", "/a/train.py", "--token=abc"], "train.py"),
        (["python", "-X", "dev", "-W", "error", "train.py"], "train.py"),
        (["python3", "-m", "torch.distributed.run", "train.py"], "torch.distributed.run"),
        (["python3", "-Im", "pkg", "x"], "pkg"),
        (["python3", "-c", "secret = 1"], "python -c"),
        (["python3"], "python3"),
        (["/bin/sh", "-c", "curl -H token"], "sh"),
        (["postgres: user db secret"], "postgres:"),
        (["a\nb"], "a?b"),
    ],
)
def test_program_name_leaves_arguments_out(tmp_path, words, name):
    """Arguments may hold secrets; the script or module is what people look for."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes("\0".join([*words, ""]).encode())
    assert program_name(7, str(tmp_path)) == name


def test_program_name_of_a_zombie_and_of_nothing(tmp_path):
    """A zombie has no command line any more, but still its name."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes(b"")
    (tmp_path / "7" / "comm").write_bytes(b"train\n")
    assert program_name(7, str(tmp_path)) == "train"
    assert program_name(8, str(tmp_path)) == ""


# -- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_says_what_works(invoke, tmp_path):
    """Status 0 where monitoring works, with the limit, the agent, the folder and the legend of the metrics."""
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    for word in (
        "kernel",
        "limit",
        "GPU",
        "memory/gpuN/used_peak_mib",
        "agent",
        "samples",
        str(tmp_path),
        "extras",
        metrics.RSS,
        "default",
    ):
        assert word in done.output
    assert os.listdir(tmp_path) == [], "it leaves nothing behind"


def test_doctor_can_leave_the_legend_out(invoke):
    """The list of metrics is long."""
    assert metrics.RSS not in invoke("doctor", "--no-metrics").output


def test_doctor_exits_1_where_monitoring_would_not_work(invoke, monkeypatch):
    """A wrong setting is enough."""
    monkeypatch.setenv("MEMTRACK_INTERVAL", "soon")
    done = invoke("doctor", "--no-metrics")
    assert done.exit_code == 1
    assert "FAIL" in done.output
    assert "cannot monitor here" in done.output


def test_doctor_refuses_a_folder_that_cannot_be_written(monkeypatch):
    """It says which folder, and how to choose another."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = checks.recordings(Settings(directory="/nowhere/to/be"))
    assert found.state == checks.BAD
    assert found.text.endswith("MEMTRACK_DIR.")


def test_a_check_that_fails_is_a_note():
    """Looking must not break the list: what cannot be told is told."""

    def look() -> checks.Check:
        raise RuntimeError("odd")

    assert checks._safely(look) == checks.Check("look", checks.NOTE, "cannot tell: RuntimeError: odd")


def test_doctor_does_not_import_trackers():
    """Versions come from metadata: importing a tracker takes seconds and may write files."""
    code = "from memtrack.cli import checks; checks.trackers(); checks.extras(); import sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(memtrack.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert not {"mlflow", "numpy", "pandas", "matplotlib"} & set(done.stdout.split())


def test_main_is_the_entry_point():
    """The console script calls what ``python -m memtrack`` calls."""
    assert callable(importlib.import_module("memtrack.__main__").main)
