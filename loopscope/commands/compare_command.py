"""`loopscope compare`: checkpoints side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loopscope.analysis.tables import COMPARED, INSIDE_MEASURES
from loopscope.commands.printing import compare_shown
from loopscope.commands.results import end, fail, write_results
from loopscope.commands.signatures import Models, Out, with_settings


@with_settings(but=["text"])
def compare(
    models: Models = None,
    out: Out = Path("out"),
    twins: Annotated[
        bool,
        typer.Option("--twins/--no-twins", help="Measure the untrained twins too, as MODEL@init."),
    ] = True,
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on",
            help="Exit with 1 if a checkpoint has one of these verdicts or findings, such as "
            "'collapsed,low rank'.",
        ),
    ] = None,
    inside: Annotated[
        bool,
        typer.Option(
            "--inside",
            help="Look inside too (lens, probe, intervene, orbit): more chapters of the report.",
        ),
    ] = False,
    **settings: Any,
) -> None:
    """Put checkpoints side by side: figures, and one table of loss and signs of collapse.

    A quoted pattern ('run/step-*') or a folder of step checkpoints is a series: one model over its
    training. Stopped at any moment, the same command goes on. Several GPUs or processes: accelerate
    launch --multi_gpu --num_processes N -m loopscope.cli compare ...
    """
    from loopscope.analysis.collapse import parse_verdicts
    from loopscope.processes import is_main

    if inside:
        settings["measures"] = (*COMPARED, *INSIDE_MEASURES)
    if not models:
        fail("compare needs checkpoints: loopscope compare A B …; zoo names work too (base mesh).")
    bad = () if fail_on is None else parse_verdicts(fail_on)
    comparison = compare_shown(
        models,
        out=out, write=write_results, twins=twins,
        **settings,
    )  # fmt: skip
    if not is_main():
        return
    caught = comparison.with_verdict(bad) if bad else []
    if caught:
        print(f"--fail-on {','.join(bad)}: {'; '.join(caught)}")
    if bad and comparison.failed:
        names = ", ".join(target for target, _ in comparison.failed)
        fail(f"--fail-on: not measured, so not judged: {names}; everything else is written.")
    end(comparison)
    if caught:
        raise typer.Exit(1)
