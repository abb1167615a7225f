"""What several commands do: measure with progress, write tables, draw, fail."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from loopscope.analysis.comparisons.work import Comparison
    from loopscope.analysis.tables.frames import Tables


def save_tables(tables: "Tables", out: Path) -> None:
    """Tables and their provenance into the output folder."""
    from loopscope.files import write_provenance

    tables.save(out / "tables")
    write_provenance(tables.provenance, out)


def write_results(comparison: "Comparison", out: Path) -> None:
    """Everything that `compare` leaves in its output folder, and the verdicts in the terminal."""
    from loopscope.analysis.comparisons.result import save_comparison
    from loopscope.commands.printing import print_verdicts, report_shown

    summary = save_comparison(comparison, out, command=shlex.join(["loopscope", *sys.argv[1:]]))
    assert summary is not None  # the command measures what the signs need
    own = [name for name in comparison.tables.models if name not in comparison.added]
    draw(comparison.tables, out, own, summary=summary)
    report_shown(summary, comparison.tables, out / "report.html")
    print()
    print_verdicts(summary)
    print(f"\nreport: {out / 'report.html'}")


def end(comparison: "Comparison") -> None:
    """End a command that could not measure everything: one line on stderr, exit code 2."""
    if comparison.incomplete:
        names = ", ".join(target for target, _ in comparison.failed)
        fail(f"not measured: {names} (see the notes); everything else is written.")


def draw(tables: "Tables", out: Path, models: list[str] | None, *, summary: Any = None) -> None:
    """Draw what the tables allow, and say what was drawn."""
    from loopscope.commands.printing import print_drawn, progress_bar
    from loopscope.figures import draw_all, plan

    jobs, _ = plan(tables, models, summary)
    with progress_bar() as bar:
        task = bar.add_task("draw", total=len(jobs))
        told = partial(bar.advance, task)
        report = draw_all(tables, out, models, progress=told, summary=summary)
    print_drawn(report, out / "figures")


def fail(message: str) -> NoReturn:
    """End the command: one line on stderr, exit code 2."""
    from loopscope.errors import InputError

    raise InputError(message)
