"""Saving what is in memory as a file whose numbers stay where they are, uncompressed, so that differences are small."""

from __future__ import annotations

import os
import sys
from typing import Any

from memtrack.errors import ArtifactError, SettingsError


def save(state: Any, path: str) -> str:
    """Save arrays, sparse matrices or what torch saves at ``path`` with the suffix of their kind. Gives the file.

    Raises SettingsError if it is nothing of these, ArtifactError if it could not be saved.
    """
    kind = _kind(state)
    if kind == "":
        raise SettingsError(
            "state", type(state).__name__, "give a path, numpy arrays, a scipy.sparse matrix, or what torch.save takes"
        )
    path += {"arrays": ".npz", "array": ".npy", "sparse": ".npz", "torch": ".pt"}[kind]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        if kind == "arrays":
            sys.modules["numpy"].savez(path, **state)
        elif kind == "array":
            sys.modules["numpy"].save(path, state, allow_pickle=False)
        elif kind == "sparse":
            sys.modules["scipy.sparse"].save_npz(path, state, compressed=False)
        else:
            sys.modules["torch"].save(state, path)
    except OSError:
        raise
    except Exception as exc:
        raise ArtifactError(f"cannot save the state: {exc}") from exc
    return path


def _kind(state: Any) -> str:
    """How to save it. Nothing is imported: who has an array has loaded numpy."""
    numpy, sparse, torch = (sys.modules.get(name) for name in ("numpy", "scipy.sparse", "torch"))
    if numpy is not None:
        if isinstance(state, numpy.ndarray):
            return "" if state.dtype.hasobject else "array"
        if isinstance(state, dict) and state and all(isinstance(value, numpy.ndarray) for value in state.values()):
            is_plain = all(isinstance(key, str) and not state[key].dtype.hasobject for key in state)
            if is_plain and "file" not in state:  # which savez takes for itself
                return "arrays"
    if sparse is not None and sparse.issparse(state):
        return "sparse"
    return "torch" if torch is not None and not isinstance(state, (int, float, bytes, type(None))) else ""
