"""`log.csv` and `monitor.csv`: the course of a training, a line at a time (needs no torch)."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loopscope.analysis.tables import RUNS
from loopscope.errors import InputError
from loopscope.files import write_text

LOG, RECIPE, MONITOR = "log.csv", "run.json", "monitor.csv"
"""Files of a training: its log, its recipe while it is not finished, its measures of collapse."""
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s")
"""Of `log.csv`."""
AGAIN = "copy the run's folder again, or leave it out."
"""What to do about a run that cannot be read."""

_COUNTS = ("step", "tokens")

Row = dict[str, int | float]


class Log:
    """The log of one training, in memory and in its file.

    Attributes:
        rows: One per interval; None where a value was not taken. Those of `log.csv` hold losses in
            nats per token.
    """

    def __init__(
        self,
        path: Path,
        rows: Iterable[Mapping[str, Any]] = (),
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        """Start the file with what a resumed training knows; later or cut lines are dropped.

        Args:
            path: The file, which is written anew.
            rows: Of the steps before; None where a value was not taken.
            columns: Names of the columns.

        Raises:
            InputError: The file cannot be written.
        """
        self.path, self.columns = path, tuple(columns)
        self.rows = [dict(row) for row in rows]
        header = dict(zip(self.columns, self.columns, strict=True))
        write_text(self._lines([header, *self.rows]), path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Args:
            row: Column → value; what is no column of the log is left out.

        Raises:
            InputError: The file cannot be written to.
        """
        kept = {name: row[name] for name in self.columns}
        self.rows.append(kept)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._lines([kept]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path}: {error.strerror or error}. Make room and give the "
                "same command to go on."
            ) from error

    def _lines(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What the logs of one kind hold, and what to say of a file that holds something else.

    Attributes:
        columns: The header of a file whose own was cut short.
        check: Raises a ValueError for a header that is none of this kind.
        row: Header and cells of a line → its row; raises a ValueError for a line that is none.
        growing: Columns that grow from row to row.
        quoted: Whether cells may be quoted, as the name of a loop with a comma in it is.
        unreadable: What to do about a file that cannot be read.
        malformed: The message on a line, with places for `path`, `line` and `reason`.
    """

    columns: Sequence[str]
    check: Callable[[Sequence[str]], None]
    row: Callable[[Sequence[str], Sequence[str]], Row]
    growing: Sequence[str]
    quoted: bool
    unreadable: str
    malformed: str


def read_log(path: Path, *, whole: bool) -> pd.DataFrame:
    """Read a `log.csv`.

    Args:
        path: The file; a missing one has no rows.
        whole: Whether the training came to its end; otherwise a last line without its line break
            is what a killed process left, and is dropped.

    Returns:
        Columns `COLUMNS`, losses in nats per token; `val_loss` is NaN where the file has none.

    Raises:
        InputError: for a file that cannot be read, or a line that is no row of a log.
    """
    types = {name: RUNS["training"][name] for name in COLUMNS}
    return pd.DataFrame(_read_rows(path, _COURSE, whole), columns=list(COLUMNS)).astype(types)


def read_numbers(path: Path, last: str) -> list[Row]:
    """The rows of a log of numbers, but for a last line that was cut short.

    Args:
        path: The file; a missing one has no rows.
        last: The name of its last column; the first is `step`.

    Returns:
        Column → value: `step` an int, the others floats, NaN where the file has none.

    Raises:
        InputError: The file cannot be read, or is no such log.
    """
    return _read_rows(path, _numbers_up_to(last), whole=False)


def _read_rows(path: Path, kind: _Kind, whole: bool) -> list[Row]:
    """The rows of a log; a last line without its line break counts where the log is `whole`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; {kind.unreadable}") from error
    if not text:
        return []
    *lines, rest = text.split("\n")
    if rest and whole:
        lines.append(rest)
    table = list(csv.reader(lines)) if kind.quoted else [line.split(",") for line in lines]
    header, *body = table or [list(kind.columns)]
    rows: list[Row] = []
    line = 1
    try:
        kind.check(header)
        for cells in body:
            line += 1
            row = kind.row(header, cells)
            if rows and not all(row[name] > rows[-1][name] for name in kind.growing):
                raise ValueError(
                    f": {' and '.join(kind.growing)} must grow, step {row['step']:.0f} after "
                    f"{rows[-1]['step']:.0f}"
                )
            rows.append(row)
    except ValueError as error:
        message = kind.malformed.format(path=path, line=line, reason=error)
        raise InputError(message) from error
    return rows


def _check_course(header: Sequence[str]) -> None:
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f" names no column {', '.join(missing)}")


def _course_row(header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise ValueError(f" has {len(cells)} fields instead of {len(header)}")
    texts = dict(zip(header, cells, strict=True))
    return {name: _course_value(texts[name], name) for name in COLUMNS}


def _course_value(text: str, column: str) -> int | float:
    if column == "val_loss" and not text:
        return math.nan
    counted = column in _COUNTS
    try:
        value: int | float = int(text) if counted else float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value < 2**63 if counted else math.isfinite(value)):
        kind = "a positive integer" if counted else "a finite number"
        raise ValueError(f": {column} must be {kind}, is {text!r}")
    return value


_COURSE = _Kind(
    columns=COLUMNS,
    check=_check_course,
    row=_course_row,
    growing=_COUNTS,
    quoted=False,
    unreadable=AGAIN,
    malformed="{path}, line {line}{reason}; " + AGAIN,
)


def _numbers_up_to(last: str) -> _Kind:
    """Logs of any numbers, from the column `step` to the column `last`."""

    def check(header: Sequence[str]) -> None:
        if [*header[:1], *header[-1:]] != ["step", last]:
            raise ValueError(f"its columns do not go from step to {last}")

    def row(header: Sequence[str], cells: Sequence[str]) -> Row:
        texts = dict(zip(header, cells, strict=True))
        step = int(texts.pop("step"))
        return {"step": step, **{n: float(x) if x else math.nan for n, x in texts.items()}}

    return _Kind(
        columns=(),
        check=check,
        row=row,
        growing=(),
        quoted=True,
        unreadable="choose another file.",
        malformed="{path} is no log of a monitor ({reason}); choose another file, or remove it.",
    )
