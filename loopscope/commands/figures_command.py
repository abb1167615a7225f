"""`loopscope figures`: the paper's diagnostic figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopscope.analysis.tables import DEFAULT
from loopscope.commands.printing import compare_shown
from loopscope.commands.results import draw, end, fail, redraw, save_tables
from loopscope.commands.signatures import Models, Out, with_settings

if TYPE_CHECKING:
    from loopscope.analysis.comparisons import Comparison

PAPER_PANELS = ["base", "residual", "anchor", "mesh"]


@with_settings(but=["more_loops", "text"])
def figures(
    models: Models = None,
    out: Out = Path("out"),
    from_tables: Annotated[
        Path | None,
        typer.Option("--from-tables", help="Redraw from the tables in this folder; no model runs."),
    ] = None,
    paper_extra: Annotated[
        bool, typer.Option("--paper-extra", help="Draw Figs. 6 and 8 alone, from training logs.")
    ] = False,
    **settings: Any,
) -> None:
    """Draw the MeSH paper's diagnostic figures (1, 3, 4, 5) and router maps.

    Without models: the paper's four panels (base, residual, anchor, mesh) from the shipped zoo;
    with --paper-extra its training logs. MODEL may then be a folder that is searched for runs.
    """
    if from_tables is not None or paper_extra:
        unused = {
            **{
                f"--{name}": settings[name]
                for name in ("layout", "data", "loops", "spec", "example")
            },
            "--paper-extra": from_tables and paper_extra,
        }
        if flags := [
            name for name, value in unused.items() if value is not None and value is not False
        ]:
            fail(f"tables or training logs are read, no model runs; leave out {', '.join(flags)}.")
        redraw(models, out, from_tables)
        return

    def write(comparison: "Comparison", out: Path) -> None:
        save_tables(comparison.tables, out)
        draw(comparison.tables, out, None)

    comparison = compare_shown(
        models or PAPER_PANELS,
        measures=DEFAULT,
        out=out, write=write, twins=False, more_loops=0, series=False,
        **settings,
    )  # fmt: skip
    end(comparison)
