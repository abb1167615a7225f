"""`log.csv`: the course of a training, a line at a time (needs no torch)."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loopscope.errors import InputError
from loopscope.output import write_text

LOG, RECIPE = "log.csv", "run.json"
"""Files of a training: its log, and its recipe while it is not finished."""
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s")


class Log:
    """The log of one training, in memory and in its file.

    Attributes:
        rows: One per interval; losses in nats per token, `val_loss` None where none was taken.
    """

    def __init__(self, path: Path, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Start the file with what a resumed training knows; later or cut lines are dropped."""
        self.path = path
        self.rows = list(rows)
        write_text(_lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows]), path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            InputError: The file cannot be written to.
        """
        kept = {name: row[name] for name in COLUMNS}
        self.rows.append(kept)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_lines([kept]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path}: {error.strerror or error}. Make room and give the "
                "same command to go on."
            ) from error


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()
