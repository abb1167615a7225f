"""`log.csv` and `monitor.csv`: the course of a training, a line at a time (needs no torch)."""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopscope.errors import InputError
from loopscope.files import write_text

LOG, RECIPE, MONITOR = "log.csv", "run.json", "monitor.csv"
"""Files of a training: its log, its recipe while it is not finished, its measures of collapse."""
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s")


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
        """Start the file with what a resumed training knows; later or cut lines are dropped."""
        self.path, self.columns = path, tuple(columns)
        self.rows = [dict(row) for row in rows]
        header = dict(zip(self.columns, self.columns, strict=True))
        write_text(self._lines([header, *self.rows]), path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

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


def read_numbers(path: Path, last: str) -> list[dict[str, Any]]:
    """The rows of a log of numbers, but for a last line that was cut short.

    Args:
        path: The file; a missing one has no rows.
        last: The name of its last column; the first is `step`.

    Returns:
        Column → value: `step` an int, the others floats, NaN where the file has none.

    Raises:
        InputError: The file cannot be read, or is no such log.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; choose another file.") from error
    if not text:
        return []
    lines = list(csv.reader(text.split("\n")[:-1])) or [[""]]
    try:
        if [lines[0][0], lines[0][-1]] != ["step", last]:
            raise ValueError(f"its columns do not go from step to {last}")
        rows: list[dict[str, Any]] = []
        for line in lines[1:]:
            given = dict(zip(lines[0], line, strict=True))
            step = int(given.pop("step"))
            numbers = {name: float(x) if x else math.nan for name, x in given.items()}
            rows.append({"step": step, **numbers})
    except ValueError as error:
        raise InputError(
            f"{path} is no log of a monitor ({error}); choose another file, or remove it."
        ) from error
    return rows
