"""From figures to files: one figure, or all that the tables allow."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope.analysis.tables import Tables
from loopscope.errors import InputError
from loopscope.figures.jobs import PREFIXES, STEMS, NotDrawn, plan
from loopscope.figures.style import Figure
from loopscope.files import whole_file, write_text

DPI = 300
SUFFIXES = (".png", ".pdf")
DRAWN = ".figures.json"
"""The list, beside the folder `figures`, of the files in it that `draw_all` wrote."""


@dataclass(frozen=True, kw_only=True)
class DrawReport:
    """What `draw_all` wrote and what it could not draw.

    Attributes:
        files: The files, in the order written.
        not_drawn: What does not apply, with the reason.
        removed: Files of an earlier `draw_all` that this one did not draw again.
    """

    files: tuple[Path, ...]
    not_drawn: tuple[NotDrawn, ...]
    removed: tuple[Path, ...] = ()

    def __str__(self) -> str:
        lines = [str(path) for path in self.files]
        lines += [f"not drawn: {item}" for item in self.not_drawn]
        return "\n".join(lines + [f"removed (of an earlier run): {path}" for path in self.removed])


def save(fig: Figure, path_without_suffix: str | Path) -> tuple[Path, ...]:
    """Write a figure as .png (300 dpi) and .pdf, each through a temporary file and a rename.

    Args:
        fig: The figure.
        path_without_suffix: Folder and name; `.png` and `.pdf` are appended.

    Returns:
        The two files.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    target = Path(path_without_suffix)
    written = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        engine = fig.get_layout_engine()
        for suffix in SUFFIXES:
            path = target.parent / (target.name + suffix)
            _write(fig, path, suffix[1:])
            written.append(path)
            fig.set_layout_engine("none")  # the layout is found by the first; it takes time
        fig.set_layout_engine(engine)
    except OSError as error:
        raise InputError(
            f"cannot write figures to {str(target.parent)!r}: {error.strerror or error}. "
            "Give a folder that exists or can be made, and that you may write to."
        ) from error
    return tuple(written)


def _write(fig: Figure, path: Path, kind: str) -> None:
    # No date: the same table gives the same bytes.
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    with whole_file(path) as part, part.open("wb") as file:
        fig.savefig(file, format=kind, dpi=DPI, metadata=metadata)


def draw_all(
    tables: Tables,
    out_dir: str | Path,
    models: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> DrawReport:
    """Draw every figure that the tables allow into `out_dir/figures`.

    Figures that an earlier call wrote there and this one does not draw again are removed at the
    end, since they would contradict the new ones; which those are is kept in
    `out_dir/.figures.json`. No other file is removed.

    Args:
        tables: What was measured.
        out_dir: Where to write; the folder `figures` in it is made.
        models: Names in the order of the panels; None takes all.
        progress: Called with the number of figures done since the last call (`plan` tells how
            many there will be).
        summary: The contents of `summary.json`, as in `plan`.

    Returns:
        The files written, what was not drawn and why, and what was removed.

    Raises:
        InputError: if a model is unknown or the folder cannot be written to.
    """
    jobs, missing = plan(tables, models, summary)
    record, folder = Path(out_dir) / DRAWN, Path(out_dir) / "figures"
    earlier = _recorded(record)
    files: list[Path] = []
    try:
        for job in jobs:
            files += save(job.make(), folder / job.name)
            if progress is not None:
                progress(1)
    except BaseException:
        with suppress(InputError):  # what stopped the drawing is the error to tell
            _write_record(record, [*earlier, *(f.name for f in files)])
        raise
    removed = _remove_stale(folder, earlier, files)
    if files or earlier:
        _write_record(record, [f.name for f in files])
    return DrawReport(files=tuple(files), not_drawn=missing, removed=removed)


def _recorded(record: Path) -> list[str]:
    try:
        names = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # none yet, or not ours: then nothing is removed
    return [n for n in names if _is_ours(n)] if isinstance(names, list) else []


def _is_ours(name: object) -> bool:
    if not isinstance(name, str) or Path(name).name != name:
        return False
    stem, dot, kind = name.rpartition(".")
    return dot + kind in SUFFIXES and (stem in STEMS or stem.startswith(PREFIXES))


def _write_record(record: Path, names: Sequence[str]) -> None:
    if names:
        write_text(json.dumps(list(dict.fromkeys(names)), indent=1) + "\n", record)
    else:
        record.unlink(missing_ok=True)


def _remove_stale(folder: Path, earlier: Sequence[str], files: Sequence[Path]) -> tuple[Path, ...]:
    drawn = {f.name.casefold() for f in files}  # some file systems ignore case
    stale = [folder / n for n in earlier if n.casefold() not in drawn]
    removed = []
    for path in stale:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(
                f"cannot remove {str(path)!r}, a figure of an earlier run that the new tables "
                f"contradict: {error.strerror or error}. Remove it yourself."
            ) from error
        removed.append(path)
    return tuple(removed)
