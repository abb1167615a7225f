"""What several commands do: measure with progress, write tables, draw, fail."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loopscope.options import parse_loops

if TYPE_CHECKING:
    from loopscope.analysis.compare import Comparison
    from loopscope.analysis.tables import Tables


def collect(models: list[str], **options: Any) -> "Comparison":
    """Measure models with progress on the terminal; options as in `compare`, loops as typed."""
    from loopscope.printing import compare_shown

    return compare_shown(models, **{**options, "loops": parse_loops(options["loops"])})


def save_tables(tables: "Tables", out: Path) -> None:
    """Tables and their provenance into the output folder."""
    from loopscope.output import write_provenance

    tables.save(out / "tables")
    write_provenance(tables.provenance, out)


def draw(tables: "Tables", out: Path, models: list[str] | None) -> None:
    """Draw what the tables allow, and say what was drawn."""
    from loopscope.figures import draw_all, plan
    from loopscope.printing import print_drawn, progress_bar

    jobs, _ = plan(tables, models)
    with progress_bar() as bar:
        task = bar.add_task("draw", total=len(jobs))
        report = draw_all(tables, out, models, progress=lambda n: bar.advance(task, n))
    print_drawn(report, out / "figures")


def fail(message: str) -> NoReturn:
    """End the command: one line on stderr, exit code 2."""
    from loopscope.errors import InputError

    raise InputError(message)
