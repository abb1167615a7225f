"""What several commands do: measure with progress, write tables, draw, fail."""

import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from loopscope.analysis.comparisons import Comparison
    from loopscope.analysis.tables import Tables


def save_tables(tables: "Tables", out: Path) -> None:
    """Write tables and their provenance.

    Args:
        tables: The tables.
        out: The output folder.
    """
    from loopscope.files import write_provenance

    tables.save(out / "tables")
    write_provenance(tables.provenance, out)


def write_results(comparison: "Comparison", out: Path) -> None:
    """Write all that `compare` leaves in its output folder, and print the verdicts.

    Args:
        comparison: What it gave.
        out: The folder.
    """
    from loopscope.analysis.comparisons import save_comparison
    from loopscope.commands.printing import print_verdicts, report_shown

    summary = save_comparison(comparison, out, command=shlex.join(["loopscope", *sys.argv[1:]]))
    assert summary is not None  # the command measures what the signs need
    named = [name for name in comparison.tables.models if name not in comparison.added]
    draw(comparison.tables, out, named, summary=summary)
    report_shown(summary, comparison.tables, out / "report.html")
    print()
    print_verdicts(summary)
    print(f"\nreport: {out / 'report.html'}")


def end(comparison: "Comparison") -> None:
    """End a command that could not measure everything: one line on stderr, exit code 2.

    Args:
        comparison: What it measured.

    Raises:
        InputError: where something was not measured that was named by itself.
    """
    if comparison.incomplete:
        names = ", ".join(target for target, _ in comparison.failed)
        fail(f"not measured: {names} (see the notes); everything else is written.")


def draw(
    tables: "Tables",
    out: Path,
    models: list[str] | None,
    *,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Draw what the tables allow, and print what was drawn.

    Args:
        tables: The tables.
        out: Folder of the folder `figures`.
        models: Which models, in which order; all when not given.
        summary: The contents of `summary.json`, for the figures that show verdicts.
    """
    from loopscope.commands.printing import print_drawn, progress_bar
    from loopscope.figures import draw_all, plan

    jobs, _ = plan(tables, models, summary)
    with progress_bar() as bar:
        task = bar.add_task("draw", total=len(jobs))
        advance = partial(bar.advance, task)
        report = draw_all(tables, out, models, progress=advance, summary=summary)
    print_drawn(report, out / "figures")


def tables_folder(folder: Path) -> Path:
    """Find the tables that a user points at.

    Args:
        folder: Of the tables, or the output folder that holds them.

    Returns:
        The folder of the tables.
    """
    inner = folder / "tables"
    return inner if inner.is_dir() else folder


def redraw(models: list[str] | None, out: Path, folder: Path | None) -> None:
    """Draw from the tables in a folder; without a folder from training logs.

    Args:
        models: Which models, or which folders to search for runs; all when not given.
        out: The output folder.
        folder: Of the tables, or the output folder that holds them.
    """
    from loopscope.analysis.tables import Tables
    from loopscope.files import claimed
    from loopscope.training import read_runs

    if folder is None:
        tables, models = read_runs(models or ()), None
        print("".join(f"note: {note}\n" for note in tables.provenance["notes"]), end="")
    else:
        tables = Tables.load(tables_folder(folder))
    with claimed(out):
        save_tables(tables, out)
        draw(tables, out, models or None)


def look_inside(
    measure: str,
    models: list[str] | None,
    out: Path,
    from_tables: Path | None,
    settings: Mapping[str, Any],
) -> None:
    """Measure what a command that looks inside is named after; write tables, figures, a summary.

    Args:
        measure: `lens`, `probe`, `intervene` or `orbit`.
        models: What to look into.
        out: The output folder.
        from_tables: Redraw from the tables in this folder instead.
        settings: What was typed: fields of `Settings`, and those of the measure's own options.
    """
    from dataclasses import fields

    from loopscope.analysis import INSIDE
    from loopscope.analysis.tables import BY_NAME
    from loopscope.commands.printing import compare_shown, print_inside
    from loopscope.processes import is_main

    if from_tables is not None:
        unused = ("layout", "data", "text", "loops", "spec", "example")
        if flags := [f"--{name}" for name in unused if settings.get(name) is not None]:
            fail(f"tables are read, no model runs; leave out {', '.join(flags)}.")
        table, folder = BY_NAME[measure].tables[0].name, tables_folder(from_tables)
        if from_tables.is_dir() and not (folder / f"{table}.parquet").is_file():
            held = ", ".join(sorted(path.stem for path in folder.glob("*.parquet"))) or "none"
            fail(f"{from_tables} has no table {table}; the tables in it: {held}.")
        redraw(models, out, from_tables)
        return
    if not models:
        fail(f"{measure} needs a model: loopscope {measure} mesh; several are put side by side.")
    own = {entry.name for entry in fields(INSIDE[measure])}
    chosen = {name: value for name, value in settings.items() if name in own}
    settings = {name: value for name, value in settings.items() if name not in own}

    def write(comparison: "Comparison", out: Path) -> None:
        save_tables(comparison.tables, out)
        draw(comparison.tables, out, None)
        print_inside(comparison.tables, measure)

    settings = {"more_loops": 0, **settings, measure: chosen}
    comparison = compare_shown(
        models, measures=(measure,), out=out, write=write, twins=False, series=False, **settings
    )
    if is_main():
        end(comparison)


def fail(message: str) -> NoReturn:
    """End the command: one line on stderr, exit code 2.

    Args:
        message: The line.

    Raises:
        InputError: always.
    """
    from loopscope.errors import InputError

    raise InputError(message)
