"""A recording as tables: numpy structured arrays, pandas, Arrow."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from memtrack.errors import MissingDependencyError
from memtrack.recording.reader import RecordingReader
from memtrack.sampling.window import LABELS

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

_pack = Struct("=ddddddIdqiHB").pack
"""One element of ``to_numpy``, with the fields that follow."""

_FIELDS = [
    ("start", "f8"),
    ("end", "f8"),
    ("min", "f8"),
    ("max", "f8"),
    ("mean", "f8"),
    ("last", "f8"),
    ("count", "u4"),
    ("max_time", "f8"),
    ("step", "i8"),
    ("epoch", "i4"),
    ("phase", "u2"),
    ("label", "u1"),
]


class Recording(RecordingReader):
    """An open recording. Besides what :class:`RecordingReader` gives, its windows as tables.

    Usable as a context manager. May be opened while the recording is still being written, and read again and again.
    """

    def __repr__(self) -> str:
        return f"<memtrack.Recording {self.path}, {self.head().windows} windows>"

    def __enter__(self) -> Recording:
        return self

    def to_numpy(self) -> dict[str, NDArray[np.void]]:
        """For each metric, by name, a structured array of its windows, oldest first, shape ``(windows,)``.

        Fields: ``start`` and ``end`` of the window and ``max_time``, when the maximum stood, in seconds of Unix time;
        ``min``, ``max``, ``mean``, ``last`` in the unit that the metric's name carries; ``count`` of samples, 0 where
        the value was held over from an earlier window; ``step``, ``epoch`` (-1: none) and ``phase`` (id, see
        ``names()``) at the maximum; ``label`` of the maximum: 1 exact, 2 sampled, 3 bound. Needs numpy, and a little
        more memory than the file is long.
        """
        np = _load("numpy", "to_numpy()")
        packed: dict[str, bytearray] = {}
        for row in self.windows():
            shift_ns = row.end_wall_ns - row.end_ns
            for name, cell in row.cells.items():
                packed.setdefault(name, bytearray()).extend(
                    _pack(
                        row.start_wall_ns / 1e9, row.end_wall_ns / 1e9, cell.min, cell.max, cell.mean, cell.last,
                        cell.count, (cell.max_ns + shift_ns) / 1e9, cell.step, cell.epoch, cell.phase, cell.label,
                    )
                )  # fmt: skip
        return {name: np.frombuffer(found, dtype=_FIELDS) for name, found in packed.items()}

    def to_pandas(self) -> pd.DataFrame:
        """One row a window and metric: the fields of ``to_numpy``, ``metric``, and ``phase`` and ``label`` in words.

        ``start``, ``end`` and ``max_time`` are UTC time stamps. Needs pandas.
        """
        pd = _load("pandas", "to_pandas()")
        np = _load("numpy", "to_pandas()")
        arrays = self.to_numpy()
        empty = np.zeros(0, dtype=_FIELDS)
        table = pd.DataFrame(np.concatenate([*arrays.values(), empty]))
        lengths = [len(array) for array in arrays.values()]
        table.insert(0, "metric", pd.Categorical.from_codes(np.repeat(np.arange(len(arrays)), lengths), list(arrays)))
        for column in ("start", "end", "max_time"):
            table[column] = pd.to_datetime(table[column], unit="s", utc=True)
        names = dict(enumerate(self.names()))
        table["phase"] = table["phase"].map(names).fillna("")
        table["label"] = table["label"].map(LABELS)
        return table

    def to_arrow(self) -> pa.Table:
        """``to_pandas`` as an Arrow table. Needs pyarrow and pandas."""
        pa = _load("pyarrow", "to_arrow()")
        return pa.Table.from_pandas(self.to_pandas(), preserve_index=False)


def _load(module: str, feature: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as exc:
        raise MissingDependencyError(feature, "data") from exc
