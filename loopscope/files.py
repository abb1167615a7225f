"""The output folder: made before the work starts, every file written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

LOCK = ".lock"
"""Held while a command writes to a folder; the file stays, the hold ends with the process."""


def prepare(folder: Path) -> None:
    """Make the folder and try to write in it, before anything is computed.

    Args:
        folder: Made with its parents where it is not there.

    Raises:
        InputError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise InputError(
            f"cannot write to {folder}: {err.strerror or err}. Give --out a folder that exists or "
            "can be made, and that you may write to."
        ) from err


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold an output folder, made if it is not there, against other commands.

    The hold ends with the process, however that ends. A folder that was made here and stayed empty
    is removed again.

    Args:
        folder: The output folder.

    Returns:
        A context that holds the folder.

    Raises:
        InputError: if another command holds it, or it cannot be made or written to.
    """
    from filelock import FileLock, Timeout

    new = [path for path in (folder, *folder.parents) if not path.exists()]
    prepare(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another command is writing to {folder}; wait for it or give another folder."
        ) from None
    except OSError as err:
        raise InputError(f"cannot lock {folder / LOCK}: {err.strerror or err}.") from err
    try:
        yield
    finally:
        try:
            if new and {path.name for path in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                for path in new:
                    path.rmdir()
        except OSError:
            pass  # somebody else's by now
        lock.release()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if not.

    Args:
        path: The file to be written.

    Returns:
        A context that gives the temporary path.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file, whole or not at all.

    Args:
        text: What to write, as UTF-8.
        path: The file; its folder is made.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as err:
        raise InputError(f"cannot write {path}: {err.strerror or err}.") from err


def write_provenance(provenance: dict[str, Any], folder: Path) -> None:
    """Write `provenance.json`: models, data hash, options, versions, seed, commit.

    Args:
        provenance: Plain JSON values.
        folder: Where to.
    """
    write_json(provenance, folder / "provenance.json")


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        value: Plain JSON values.
        path: The file; its folder is made.
    """
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """Write a table as CSV, whole or not at all.

    Args:
        table: The table; its index is left out.
        path: The file; its folder is made.
    """
    write_text(table.to_csv(index=False), path)
