"""Labels that a user gives to probes: arrays, tables and files, checked and turned into numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loopscope.errors import InputError, unknown_name
from loopscope.text import BUILT_IN_LABELS, CLASS_LABELS, is_python, token_labels, token_pieces

MOST_CLASSES = 100
"""Labels with more classes are refused: they are numbers, or names that nothing repeats."""

_FILES = (".npy", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """One label per token, or per sample.

    Attributes:
        values: (samples, pos) or (samples,): of classes their numbers from 0, −1 where there is no
            label; of numbers float64, NaN where there is none.
        listed: Whether a table listed single tokens, so that samples and tokens behind the last
            are without label.
    """

    values: np.ndarray
    listed: bool = False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, for provenance to hash."""
        return self.values if dtype is None else self.values.astype(dtype)

    @property
    def are_classes(self) -> bool:
        """Whether they are classes, not numbers."""
        return self.values.dtype.kind == "i"

    @property
    def present(self) -> np.ndarray:
        """Where there is a label, in the shape of the values."""
        return self.values >= 0 if self.are_classes else np.isfinite(self.values)

    def chosen(self, numbers: Sequence[int]) -> "Labels":
        """Give those of some samples.

        Args:
            numbers: Which.

        Returns:
            Their labels.
        """
        places = np.asarray(numbers)
        values = self.values
        if self.listed and (lack := int(places.max(initial=-1)) + 1 - len(values)) > 0:
            values = np.pad(values, ((0, lack), (0, 0)), constant_values=self._nothing)
        return Labels(values=values[places], listed=self.listed)

    def of_samples(self, name: str, samples: int, pos: int) -> "Labels":
        """Check that there is one for each token or each sample.

        Args:
            name: What they are called, for the message.
            samples: Number of samples.
            pos: Tokens of each.

        Returns:
            The labels, (samples, pos) or (samples,).

        Raises:
            InputError: for another shape.
        """
        shape = self.values.shape
        if self.listed and shape[0] <= samples and shape[1] <= pos:
            lack = ((0, samples - shape[0]), (0, pos - shape[1]))
            return Labels(values=np.pad(self.values, lack, constant_values=self._nothing))
        if shape in ((samples, pos), (samples,)):
            return self
        raise InputError(
            f"labels {name!r} have the shape {shape}; {samples} samples of {pos} tokens take one "
            f"for each token, ({samples}, {pos}), or for each sample, ({samples},)."
        )

    @property
    def _nothing(self) -> float:
        return -1.0 if self.are_classes else np.nan


def read_labels(given: Any) -> dict[str, Labels | None] | None:
    """Take labels in whatever form they come.

    Args:
        given: Names of built-in labels and paths of files, as a sequence or with commas between
            them; or name → array (None for built-in ones), a data frame, or one array (then they
            are called `labels`).
            Integers, booleans and strings are classes, floats are numbers; NaN and None are no
            label. Files: `.npy`; `.csv` and `.parquet` with a column for each kind of labels and a
            row for each sample, or, with the columns `sample` and `pos`, for each token.

    Returns:
        Name → the labels, None for built-in ones; None for None.

    Raises:
        UnknownNameError: for a name that is neither built in nor a file.
        InputError: for what cannot be labels.
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        given = str(given).split(",")
    if isinstance(given, list | tuple) and all(isinstance(part, str | Path) for part in given):
        chosen: dict[str, Labels | None] = {}
        for part in given:
            chosen |= _named(str(part).strip())
    elif isinstance(given, pd.DataFrame):
        chosen = {**_columns(given, "the data frame")}
    elif isinstance(given, Mapping):
        chosen = {
            str(name): None if values is None and name in BUILT_IN_LABELS
            else _labels(str(name), values)
            for name, values in given.items()
        }  # fmt: skip
    else:
        chosen = {"labels": _labels("labels", given)}
    if not chosen:
        raise InputError(f"no labels were given; choose from {', '.join(BUILT_IN_LABELS)}.")
    return chosen


def labels_of_text(
    tokenizer: Any, tokens: Sequence[Sequence[int]], names: Sequence[str]
) -> tuple[dict[str, Labels], bool]:
    """Label tokens by the text that they decode to.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or any other with its `decode`.
        tokens: Ids of windows of one length.
        names: Which of `text.BUILT_IN_LABELS`.

    Returns:
        Name → one label per token (samples, pos), and whether the text was taken for Python.

    Raises:
        InputError: for a tokenizer that cannot decode.
    """
    pieces = [token_pieces(tokenizer, row) for row in tokens]
    python = is_python(["".join(window) for window in pieces])
    labels = {}
    for name, values in token_labels(pieces, names, python=python).items():
        codes = np.nan_to_num(values, nan=-1.0).astype(np.int64)
        labels[name] = Labels(values=codes if name in CLASS_LABELS else values)
    return labels, python


def _named(name: str) -> Mapping[str, Labels | None]:
    """Built-in labels, or those of a file."""
    path = Path(name)
    if name in BUILT_IN_LABELS:
        return {name: None}
    if path.suffix not in _FILES:
        raise unknown_name(
            "labels", name, BUILT_IN_LABELS, hint=f"Labels of your own: a {', '.join(_FILES)} file."
        )
    if not path.is_file():
        raise InputError(f"there is no file {path} with labels.")
    try:
        if path.suffix == ".npy":
            return {path.stem: _labels(path.stem, np.load(path, allow_pickle=False))}
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except InputError:
        raise
    except Exception as error:  # whatever the readers of three formats raise
        raise InputError(f"{path} cannot be read as labels ({error}).") from error
    return _columns(frame, str(path))


def _columns(frame: pd.DataFrame, source: str) -> dict[str, Labels]:
    """The labels of each column."""
    places = [name for name in ("sample", "pos") if name in frame]
    names = [str(name) for name in frame if name not in ("sample", "pos", "document")]
    if not names:
        raise InputError(f"{source} has no column of labels.")
    if places == ["sample", "pos"]:
        rows, columns = (_whole(frame[name], name, source) for name in places)
        return {name: _listed(name, frame[name], rows, columns) for name in names}
    if places == ["sample"]:
        frame = frame.sort_values("sample")
        if frame["sample"].tolist() != list(range(len(frame))):
            raise InputError(f"the column sample of {source} must hold 0, 1, 2 … once each.")
    elif places:
        raise InputError(f"{source} has a column pos without sample; give both, or neither.")
    return {name: _labels(name, frame[name]) for name in names}


def _whole(column: pd.Series, name: str, source: str) -> np.ndarray:
    places = column.to_numpy()
    if places.dtype.kind not in "iu" or (len(places) and places.min() < 0):
        raise InputError(f"the column {name} of {source} must hold whole numbers from 0.")
    return places


def _listed(name: str, column: pd.Series, rows: np.ndarray, places: np.ndarray) -> Labels:
    labels = _labels(name, column)
    shape = (int(rows.max(initial=-1)) + 1, int(places.max(initial=-1)) + 1)
    values = np.full(shape, labels._nothing, labels.values.dtype)
    values[rows, places] = labels.values
    return Labels(values=values, listed=True)


def _labels(name: str, given: Any) -> Labels:
    """Turn an array of any kind into labels; what is labels stays."""
    if isinstance(given, Labels):
        return given
    if hasattr(given, "detach"):  # a tensor
        given = given.detach().cpu()
        given = (given.double() if given.is_floating_point() else given).numpy()
    nullable = isinstance(given, pd.Series) and not isinstance(given.dtype, np.dtype)
    array = np.asarray(given, dtype=object if nullable or isinstance(given, list | tuple) else None)
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(
            f"labels {name!r} have the shape {array.shape}; give one for each token (samples × "
            "tokens) or for each sample (samples)."
        )
    if array.dtype.kind not in "biufUSO":
        raise InputError(
            f"labels {name!r} are {array.dtype}; integers, booleans and strings are classes, "
            "floats are numbers."
        )
    if array.dtype.kind == "f" or (array.dtype.kind == "O" and _are_numbers(array)):
        numbers = pd.to_numeric(pd.Series(array.reshape(-1))).to_numpy(np.float64, na_value=np.nan)
        numbers = np.where(np.isfinite(numbers), numbers, np.nan)
        return Labels(values=numbers.reshape(array.shape))
    try:
        codes, classes = pd.factorize(array.reshape(-1))
    except TypeError as error:  # lists of unequal lengths
        raise InputError(f"labels {name!r} are no array of one or two axes ({error}).") from error
    if len(classes) > MOST_CLASSES:
        raise InputError(
            f"labels {name!r} have {len(classes)} classes; at most {MOST_CLASSES} can be probed. "
            "Numbers are given as floats."
        )
    return Labels(values=codes.astype(np.int64).reshape(array.shape))


def _are_numbers(array: np.ndarray) -> bool:
    """Whether objects are numbers and not all of them whole, what is missing aside."""
    known = [value for value in array.reshape(-1) if not (value is None or value is pd.NA)]
    numbers = all(isinstance(value, int | float | np.number) for value in known)
    return numbers and any(isinstance(value, float | np.floating) for value in known)


__all__ = ["MOST_CLASSES", "Labels", "labels_of_text", "read_labels"]
