"""Names of sinks and trackers: ours are strings, others come by entry points."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from memtrack import registry
from memtrack.errors import MissingDependencyError, SettingsError
from memtrack.sinks.jsonl import JsonLinesSink

PLUGIN = Path(__file__).parents[1] / "data" / "plugin"


def test_our_sinks():
    """A name gives the class."""
    assert registry.load_sink("jsonl") is JsonLinesSink


@pytest.mark.parametrize(("module", "attribute"), [
    target.partition(":")[::2]
    for *targets, _ in [*registry.SINKS.values(), *registry.AUTOLOG.values(), *registry.STORES.values()]
    for target in targets
])  # fmt: skip
def test_every_target_exists(module, attribute):
    """The strings of the registry name modules that are there; their extra is one that the distribution has."""
    assert find_spec(module) is not None
    assert attribute


def test_every_extra_exists():
    """What a MissingDependencyError says to install can be installed."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    for *_, extra in [*registry.SINKS.values(), *registry.AUTOLOG.values(), *registry.STORES.values()]:
        assert not extra or f"\n{extra} = [" in f"\n{extras}"


def test_unknown_sink():
    """An unknown name is an error that lists the known ones."""
    with pytest.raises(SettingsError, match=r"sinks='nope': no such sink\. There are: comet, jsonl, mlflow, wandb"):
        registry.load_sink("nope")


def test_unknown_tracker():
    """As is an unknown tracker."""
    with pytest.raises(SettingsError, match=r"trackers='nope': no such tracker\. There are: comet, mlflow, wandb\."):
        registry.load_autolog("nope")


def test_unknown_store():
    """And where artifacts would be stored, or read from."""
    with pytest.raises(SettingsError, match=r"to='nope': no such tracker\. There are: comet, mlflow, wandb\."):
        registry.load_active_stores("nope")
    with pytest.raises(SettingsError, match=r"source='nope': no such tracker\."):
        registry.load_store("nope")


def test_sink_of_another_distribution(monkeypatch):
    """A distribution that is installed, which here is a folder on the path, adds a sink by its entry point."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    importlib.invalidate_caches()
    assert registry.sink_names() == ["comet", "fake", "jsonl", "mlflow", "wandb"]
    import memtrack_fake_plugin

    assert registry.load_sink("fake") is memtrack_fake_plugin.FakeSink
    with pytest.raises(SettingsError, match="There are: comet, fake, jsonl, mlflow, wandb"):
        registry.load_sink("nope")


def test_extra_that_is_not_installed(monkeypatch):
    """A missing package of somebody else is a MissingDependencyError with the command to run."""
    monkeypatch.setitem(registry.SINKS, "other", ("no_such_package_at_all:Sink", "mlflow"))
    with pytest.raises(MissingDependencyError) as caught:
        registry.load_sink("other")
    assert str(caught.value).endswith("pip install 'memtrack[mlflow]'")
    assert caught.value.extra == "mlflow"
    assert isinstance(caught.value, ImportError)


def test_missing_module_of_ours_is_not_hidden(monkeypatch):
    """A broken installation is not reported as a missing extra."""
    monkeypatch.setitem(registry.SINKS, "other", ("memtrack.no_such_module:Sink", "mlflow"))
    with pytest.raises(ModuleNotFoundError) as caught:
        registry.load_sink("other")
    assert not isinstance(caught.value, MissingDependencyError)
