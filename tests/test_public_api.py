"""The names that users may rely on."""

from __future__ import annotations

import types

import memtrack
import memtrack.errors


def test_all_is_sorted_and_complete() -> None:
    assert list(memtrack.__all__) == sorted(memtrack.__all__)
    assert set(dir(memtrack)) >= set(memtrack.__all__)
    for name in memtrack.__all__:
        getattr(memtrack, name)
    plumbing = {name for name, value in vars(memtrack).items() if isinstance(value, types.ModuleType)}
    plumbing |= {"TYPE_CHECKING", "annotations"}
    public = {name for name in dir(memtrack) if not name.startswith("_")} - plumbing
    assert {name for name in memtrack.__all__ if not name.startswith("_")} == public


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(memtrack, "no_such_name")


def test_public_names_have_docstrings() -> None:
    for name in memtrack.__all__:
        value = getattr(memtrack, name)
        if callable(value):
            assert value.__doc__, name


def test_every_error_is_a_memtrack_error() -> None:
    errors = [v for v in vars(memtrack.errors).values() if isinstance(v, type) and issubclass(v, BaseException)]
    assert memtrack.errors.MemtrackError in errors
    for error in errors:
        assert issubclass(error, memtrack.errors.MemtrackError)
        assert f" {error.__name__} " in f"{memtrack.errors.__doc__}".replace("\n", " \n"), "not in the tree on top"
