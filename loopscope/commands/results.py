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


def fail(message: str) -> NoReturn:
    """End the command: one line on stderr, exit code 2.

    Args:
        message: The line.

    Raises:
        InputError: always.
    """
    from loopscope.errors import InputError

    raise InputError(message)
