"""Rows of a table, filled sample by sample into arrays of fixed size."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from loopscope.analysis.flags import FLAG_NAMES, Flag
from loopscope.analysis.tables.registry import SCHEMAS, schema
from loopscope.names import MAIN_LOOP


class Rows:
    """One table of one model while it is being measured: the same rows for every sample.

    `values[column]` and `flag` are arrays (sample, row) to write into; the other columns are the
    same for each sample and only stored once until `frame` is called.

    Attributes:
        table: The table's name.
        samples: Number of samples.
        columns: Its columns besides the common ones, with their dtypes.
        keys: The columns that tell a sample's rows apart.
        rows: Rows of each sample.
        values: Column → what is measured, NaN until written.
        flag: Codes of `Flag`.
    """

    def __init__(self, table: str, samples: int, keys: Mapping[str, Sequence[str] | np.ndarray]):
        """Set aside room for `samples` times as many rows as each of `keys` is long.

        Args:
            table: The table's name.
            samples: Number of samples.
            keys: The columns that tell a sample's rows apart: strings or integers. What the table
                has besides are its values.
        """
        self.table, self.samples = table, samples
        self.columns = SCHEMAS[table]
        self.keys = {column: np.asarray(key) for column, key in keys.items()}
        self.rows = len(next(iter(self.keys.values()))) if self.keys else 1
        shape = (samples, self.rows)
        self.values = {
            column: np.full(shape, np.nan, dtype=dtype)
            for column, dtype in self.columns.items()
            if column not in self.keys
        }
        self.flag = np.full(shape, int(Flag.NONE), dtype=np.int8)

    def frame(self, model: str, loop: str = MAIN_LOOP) -> pd.DataFrame:
        """Give the table; its values are the arrays themselves, not copies of them.

        Args:
            model: The model's name.
            loop: The loop's name.

        Returns:
            One row per sample and key, with the columns of `schema`; documents are null.
        """
        total = self.samples * self.rows
        no_step = pd.arrays.IntegerArray(np.zeros(total, np.int64), np.ones(total, bool))
        filled = {
            "model": _constant(model, total),
            "step": no_step,
            "sample": np.repeat(np.arange(self.samples, dtype=np.int32), self.rows),
            "document": _coded(np.full(total, -1, np.int8), []),
            "loop": _constant(loop, total),
            "flag": _coded(self.flag.reshape(-1), FLAG_NAMES),
        }
        for column, dtype in self.columns.items():
            if column in self.values:
                filled[column] = self.values[column].reshape(-1)
            else:
                filled[column] = _tiled(self.keys[column], self.samples, dtype)
        return pd.DataFrame({name: filled[name] for name in schema(self.table)}, copy=False)


def columns(names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Turn the keys of rows into columns.

    Args:
        names: What the columns are called.
        rows: Strings or integers, one tuple per row.

    Returns:
        One array per column.
    """
    return dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def renumbered(frame: pd.DataFrame, numbers: Sequence[int] | np.ndarray) -> pd.DataFrame:
    """Give the rows of chosen samples their samples' numbers.

    Args:
        frame: With samples numbered from 0.
        numbers: The number of each.

    Returns:
        The same frame.
    """
    frame["sample"] = np.asarray(numbers, np.int32)[frame["sample"].to_numpy()]
    return frame


def _coded(codes: np.ndarray, names: Sequence[str]) -> pd.Categorical:
    categories: Any = pd.Index(list(names), dtype="str")
    return pd.Categorical.from_codes(codes, categories)


def _constant(name: str, length: int) -> pd.Categorical:
    return _coded(np.zeros(length, np.int8), [name])


def _tiled(key: np.ndarray, times: int, dtype: str) -> pd.Categorical | np.ndarray:
    if dtype != "category":
        return np.tile(key.astype(dtype), times)
    names = list(dict.fromkeys(key.tolist()))
    code = {name: i for i, name in enumerate(names)}
    small = np.int8 if len(names) < 128 else np.int32
    codes = np.array([code[name] for name in key.tolist()], dtype=small)
    return _coded(np.tile(codes, times), names)
