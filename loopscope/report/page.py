"""The page itself: template and contents to one HTML file."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loopscope.analysis.tables import Tables
from loopscope.figures import of_steps, shortened, steps_of
from loopscope.files import write_text
from loopscope.report import contents
from loopscope.report.loop_rows import per_loop
from loopscope.report.numbers import count
from loopscope.report.pictures import chapters, pictures

_NAME = 48  # letters of a name at the head of a column; cards have all of it


def write_report(
    summary: Mapping[str, Any],
    tables: Tables,
    path: str | Path,
    *,
    provenance: Mapping[str, Any],
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write the report of a comparison as one HTML file, whole or not at all.

    Args:
        summary: The contents of `summary.json`.
        tables: What was measured; the figures are drawn from it.
        path: The file.
        provenance: What `provenance.json` holds.
        progress: Called with 1 after each figure.

    Returns:
        The file.

    Raises:
        InputError: if it cannot be written.
    """
    path = Path(path)
    write_text(render(summary, tables, provenance=provenance, progress=progress), path)
    return path


def render(
    summary: Mapping[str, Any],
    tables: Tables,
    *,
    provenance: Mapping[str, Any],
    progress: Callable[[int], object] | None = None,
) -> str:
    """Make the report of a comparison: HTML that needs no other file and no network.

    The same input gives the same text.

    Args:
        summary: The contents of `summary.json`.
        tables: What was measured; the figures are drawn from it.
        provenance: What `provenance.json` holds.
        progress: Called with 1 after each figure.

    Returns:
        The page.
    """
    drawn, not_drawn = pictures(tables, summary, progress)
    steps = {model: steps_of(tables, model) for model in tables.models}
    last = {model: {numbers[-1]} for model, numbers in steps.items() if len(numbers) > 1}
    ends = of_steps(tables, last)
    measures, absent = contents.measure_rows(summary)
    columns, differences, reasons = contents.difference_rows(summary)
    page = _environment().get_template("report.html").render(
        summary=summary,
        shown=contents.shown(summary),
        headline=contents.headline(summary),
        findings=contents.finding_counts(summary),
        cards=contents.cards(summary),
        meanings=contents.meanings(summary),
        pictures=drawn,
        not_drawn=not_drawn,
        inside=chapters(tables, summary, progress),
        loops=per_loop(ends),
        measures=measures,
        absent=absent,
        columns=columns,
        differences=differences,
        reasons=reasons,
        significant=contents.SIGNIFICANT,
        runs=contents.runs(summary),
        facts=contents.facts_of(provenance),
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False, default=str),
        count=count,
        alone=False,
    )  # fmt: skip
    # a path need not be text: what UTF-8 cannot hold is written as its number
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def verdict_html(summary: Mapping[str, Any]) -> str:
    """Show the verdicts of a summary in a notebook.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        A piece of HTML with its own style.
    """
    template = _environment().get_template("verdicts.html")
    return template.render(cards=contents.cards(summary), summary=summary, alone=True)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loopscope.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = lambda label: shortened(str(label), _NAME)
    return environment
