"""Settings: one sentence for whatever is wrong with them, before anything starts."""

from __future__ import annotations

import math
import os
import stat

import pytest

from memtrack import config
from memtrack.config import Settings, resolve
from memtrack.errors import MemtrackError, RecordingError, SettingsError

DURATIONS = ["interval", "flush_interval", "tick"]


def test_defaults():
    """Nothing given, nothing in the environment: the documented defaults."""
    settings = resolve({}, {})
    assert settings == Settings()
    assert (settings.interval_s, settings.flush_interval_s, settings.recording_bytes) == (1.0, 10.0, 4 << 20)
    assert (settings.directory, settings.metrics, settings.cpu_budget_pct) == (".memtrack", "default", 0.2)


def test_settings_cannot_be_changed():
    """They are validated once, so they must stay as they are."""
    with pytest.raises(AttributeError):
        Settings().interval_s = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("2s", 2.0), ("2", 2.0), (" 1.5 s ", 1.5), ("1min", 60.0), ("2m", 120.0), ("1h", 3600.0),
     ("200000us", 0.2), (3, 3.0), (0.25, 0.25), ("1e1", 10.0), ("1e1s", 10.0), (".5s", 0.5), ("2 MIN", 120.0)],
)  # fmt: skip
def test_durations(text, seconds):
    """Numbers are seconds; texts may carry a unit, with or without a blank."""
    assert resolve({"interval": text}, {}).interval_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8MiB", 8 << 20), ("8MB", 7999488), (4194304, 4 << 20), ("2097152", 2 << 20), ("1GiB", 1 << 30),
     ("0.5 gib", 1 << 29), ("2048KiB", 2 << 20), ("8e6", 7999488), (1048576 + 5, 1 << 20)],
)  # fmt: skip
def test_sizes(text, size):
    """MiB is 2**20 and MB is 10**6; sizes are rounded down to whole pages."""
    assert resolve({"recording_size": text}, {}).recording_bytes == size


WRONG = [
    *[(name, value) for name in DURATIONS for value in (
        0, -1, 0.001, math.nan, math.inf, -math.inf, "0s", "-5s", "nan", "inf", "1e999", "1e308h", "10 parsecs", "s",
        "",
        "1s2", "1..5", True, [1], "2 days", 1e9, "1_0s",
    )],
    *[("recording_size", value) for value in (
        0, -1, 1000, "1KiB", "1023KiB", math.nan, math.inf, "8 megs", "1e300GiB", "-8MiB", b"8MiB", 2**63, False, "MiB",
    )],
    *[("cpu_budget", value) for value in (0, -0.1, 101, math.nan, math.inf, "much", True, [], "0.2%")],
    *[("metrics", value) for value in ("", "rss", ["memory/process", "rss"], [], 5, ",", "Default")],
    *[("directory", value) for value in (5, ["x"], 1.5, "", "a\0b")],
    *[("keep", value) for value in (0, -1, 0.5, 1e12, "many", math.nan)],
    *[("keep_days", value) for value in (0, -1, 1e12, "long", math.inf)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_wrong_values(name, value):
    """Each is a SettingsError of one line that names the argument and the value and says what to do."""
    with pytest.raises(SettingsError) as caught:
        resolve({name: value}, {})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}: ")
    assert "\n" not in message
    assert len(message.removeprefix(f"{name}={value!r}: ")) > 15
    assert (caught.value.name, caught.value.value) == (name, value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MemtrackError)


def test_wrong_value_in_the_environment():
    """Then it is the variable that is named."""
    with pytest.raises(SettingsError, match=r"^MEMTRACK_INTERVAL='soon': give a duration in seconds"):
        resolve({}, {"MEMTRACK_INTERVAL": "soon"})


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("MEMTRACK_INTERVALL", "Did you mean MEMTRACK_INTERVAL?"),
        ("MEMTRACK_FLUSHINTERVAL", "Did you mean MEMTRACK_FLUSH_INTERVAL?"),
        ("MEMTRACK_DIRECTRY", "Did you mean MEMTRACK_DIRECTORY?"),
        ("MEMTRACK_SOMETHING_ELSE_ENTIRELY", "There are: MEMTRACK_CPU_BUDGET, "),
    ],
)
def test_unknown_variable(variable, hint):
    """A variable that is misspelt is an error that suggests the right one: silence would hide it for ever."""
    with pytest.raises(SettingsError) as caught:
        resolve({}, {variable: "1"})
    assert f"{variable}='1': no such setting. {hint}" in str(caught.value)


def test_unknown_argument():
    """As is an argument."""
    with pytest.raises(SettingsError, match=r"intervall=1: no such setting\. Did you mean interval\?"):
        resolve({"intervall": 1}, {})


def test_precedence():
    """Arguments win over the environment, which wins over defaults; None is not given, and neither is an empty text."""
    environ = {"MEMTRACK_INTERVAL": "3s", "MEMTRACK_TICK": "50ms", "MEMTRACK_FLUSH_INTERVAL": ""}
    settings = resolve({"interval": 2.0, "tick": None}, environ)
    assert (settings.interval_s, settings.tick_s, settings.flush_interval_s) == (2.0, 0.05, 10.0)


def test_variables_that_are_no_settings():
    """What other parts and the tests use is let through."""
    resolve({}, {"MEMTRACK_DEBUG": "1", "MEMTRACK_TEST_ANYTHING": "1", "OTHER": "1"})


@pytest.mark.parametrize(
    ("text", "disabled"),
    [("1", True), ("true", True), ("yes", True), ("0", False), ("false", False), ("No", False), ("OFF", False)],
)
def test_disable(text, disabled):
    """Switched off by anything but 0, false, no and off."""
    assert resolve({}, {"MEMTRACK_DISABLE": text}).disable is disabled


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("default", "default"),
        ("all", "all"),
        (["all"], "all"),
        ("memory/process, memory/host/", ("memory/process", "memory/host/")),
        (["memory/process"], ("memory/process",)),
        (("memory/tree/pss_mib",), ("memory/tree/pss_mib",)),
    ],
)
def test_metrics(given, chosen):
    """Texts are split at commas, so that the environment can name several."""
    assert resolve({"metrics": given}, {}).metrics == chosen


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"interval": 0.5, "tick": "20ms", "recording_size": "8MiB", "cpu_budget": 1},
        {"metrics": ["memory/process", "memory/host"], "directory": "/some/where", "disable": True},
    ],
)
def test_environment_round_trip(arguments):
    """What a child process is given in its environment means the same there."""
    settings = resolve(arguments, {})
    assert resolve({}, config.environment(settings)) == settings


def test_directory_may_be_a_path(tmp_path):
    """Anything that os.fspath takes is a folder."""
    assert resolve({"directory": tmp_path}, {}).directory == str(tmp_path)
    assert resolve({}, {"MEMTRACK_DIR": "a"}).directory == resolve({}, {"MEMTRACK_DIRECTORY": "a"}).directory == "a"


def test_folder_is_made_private(tmp_path):
    """The folder of the recordings is made with its parents, and nobody else may look into it."""
    path = config.make_directory(Settings(directory=str(tmp_path / "new" / "recordings")))
    assert os.path.isabs(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert config.make_directory(Settings(directory=path)) == path


def test_folder_that_cannot_be_made(tmp_path):
    """It is a RecordingError that names the folder and the way out."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="MEMTRACK_DIR") as caught:
        config.make_directory(Settings(directory=str(tmp_path / "file" / "below")))
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(RecordingError, match="cannot make the recordings folder"):
        config.make_directory(Settings(directory=str(tmp_path / "file")))


def test_folder_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    """Of the ranks of a distributed training, which start at once, all but the fastest failed with "File exists"."""
    real = os.mkdir

    def overtaken(path, *mode):
        real(path, *mode)
        real(path, *mode)

    monkeypatch.setattr(os, "mkdir", overtaken)
    path = str(tmp_path / "recordings")
    assert config.make_directory(Settings(directory=path)) == path
    assert os.path.isdir(path)
