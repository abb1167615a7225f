"""The small print under a figure: how many samples, what was left out, which options."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from loopscope.analysis.tables import Tables, aggregate, model_record
from loopscope.figures.names import model_label, printable
from loopscope.figures.panels import Panel, shortened
from loopscope.figures.style import GREY, SMALL, Figure

_LISTED = 8  # models whose numbers of samples are listed
_NAME = 48  # letters of a name


def note(fig: Figure, *sentences: str) -> None:
    """Write small print under a figure: what was drawn, from how many samples.

    Args:
        fig: The figure.
        *sentences: The parts; empty ones are skipped.
    """
    size = SMALL - 0.5
    text = " ".join(s for s in sentences if s).replace("n = ", "n\u00a0=\u00a0")
    letters = int(fig.get_figwidth() * 72 / (size * 0.56))
    lines = textwrap.wrap(text, letters, break_on_hyphens=False)
    text = "\n".join(lines).replace("\u00a0", " ")
    fig.supxlabel(text, x=0.01, ha="left", fontsize=size, color=GREY, linespacing=1.25)


def samples_note(frame: pd.DataFrame, panels: Sequence[Panel], column: str = "value") -> str:
    """Say how many samples a figure rests on and how many flagged values were left out.

    Args:
        frame: The measured table, only the rows that are drawn.
        panels: What is shown.
        column: The column that is averaged.

    Returns:
        Sentences such as 'n = 500 samples. Left out as flagged: mesh 3 values in 2 samples (zero).'
    """
    counts = aggregate.left_out(frame, column)
    parts = [(shortened(p.title, _NAME), _LeftOut.of(p, counts)) for p in panels]
    ns = {title: left_out.samples for title, left_out in parts}
    if len(set(ns.values())) == 1:
        text = f"n = {next(iter(ns.values()))} samples{' each' if len(ns) > 1 else ''}."
    elif len(ns) > _LISTED:
        text = f"n = {min(ns.values())} to {max(ns.values())} samples."
    else:
        text = f"n samples: {', '.join(f'{title} {n}' for title, n in ns.items())}."
    return text + _flagged_text(parts)


def combined_note(panel: Panel, parts: dict[str, tuple[pd.DataFrame, str]]) -> str:
    """Say how many samples a figure of several tables rests on, and what was left out where.

    Args:
        panel: What is shown.
        parts: Name of a part of the figure → its measured table and the averaged column.

    Returns:
        Sentences such as 'n = 500 samples. Left out as flagged: (b) 3 values in 2 samples (zero).'
    """
    counted = [
        (name, _LeftOut.of(panel, aggregate.left_out(panel.rows(frame), column)))
        for name, (frame, column) in parts.items()
    ]
    ns = {name: left_out.samples for name, left_out in counted}
    if len(set(ns.values())) == 1:
        text = f"n = {next(iter(ns.values()))} samples."
    else:
        text = f"n samples: {', '.join(f'{name} {n}' for name, n in ns.items())}."
    return text + _flagged_text(counted)


def options_note(tables: Tables, panels: Sequence[Panel], *names: str) -> str:
    """Say which options other than the defaults the drawn tables were measured with.

    Args:
        tables: What was measured; the options are in its provenance.
        panels: What is shown.
        *names: The tables drawn.

    Returns:
        A sentence such as 'Measured with: first 2 tokens left out.', empty for the defaults.
    """
    models = dict.fromkeys(panel.model for panel in panels)
    texts = {model: _options(tables, model, set(names)) for model in models}
    if len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
    else:
        text = "; ".join(f"{model_label(m)}: {t}" for m, t in texts.items() if t)
    return f"Measured with: {text}." if text else ""


def _options(tables: Tables, model: str, names: set[str]) -> str:
    options = model_record(tables.provenance, model).options
    parts = []
    if drop := options.get("drop_first"):
        parts.append(f"first {'token' if drop == 1 else f'{drop} tokens'} left out")
    if options.get("center") and names & {"spectrum", "rank"}:
        parts.append("states centred for spectrum and ranks")
    if options.get("normalize_rows") and names & {"cka", "spectrum", "rank"}:
        parts.append("rows of norm 1")
    if options.get("bandwidth", 1.0) != 1.0 and "cka" in names:
        parts.append(f"RBF bandwidth t = {options['bandwidth']:g}")
    for measure, table in (("lens", "lens"), ("intervene", "effect")):
        if table in names and (where := options.get(measure, {}).get("where")) is not None:
            what = f"{where} tokens" if isinstance(where, str) else "tokens of a choice"
            parts.append(f"predictions of {what} alone")
    return ", ".join(parts)


def states_note(panels: Sequence[Panel]) -> str:
    """Say which iteration a state of a nested loop enters.

    Args:
        panels: What is shown.

    Returns:
        A sentence, empty where no loop is nested.
    """
    nested = [panel for panel in panels if any("." in path for path in panel.paths)]
    if not nested:
        return ""
    first, *_, last = nested[0].paths
    return (
        f"{nested[0].title}: $h(t)$ enters the $t$-th of the iterations {printable(first)} … "
        f"{printable(last)}, counted from 0 in the order in which they run."
    )


def paths_note(panels: Sequence[Panel]) -> str:
    """Say how to read the labels of iterations in nested loops, or in several loops.

    Args:
        panels: What is shown.

    Returns:
        Sentences such as 'H0.L1: iteration 1 of L in iteration 0 of H. …', empty where
        iterations are simply numbered.
    """
    labels = [path for panel in panels for path in panel.paths]
    if not labels:
        return ""
    deepest = max(path.count(".") for path in labels)
    example = [path for path in labels if path.count(".") == deepest][:2][-1]
    parts = [re.fullmatch(r"(.*?)(\d+)", part) for part in example.split(".")]
    places = [f"iteration {p[2]} of {printable(p[1])}" for p in parts if p and p[1]]
    if len(places) != len(parts):
        return f"{printable(example)}: an iteration's place in the loops, counted from 0."
    return (
        f"{printable(example)}: {' in '.join(reversed(places))}. Iterations stand in the order in "
        "which they run, all counted from 0; $h(t)$ enters the $t$-th. Prelude and coda: all that "
        "runs before and after this loop."
    )


@dataclass(frozen=True, kw_only=True)
class _LeftOut:
    """How many samples a panel has, and what of them was left out as flagged."""

    samples: int
    flagged_values: int
    flagged_samples: int
    reasons: str

    @classmethod
    def of(cls, panel: Panel, counts: pd.DataFrame) -> "_LeftOut":
        rows = panel.rows(counts)
        return cls(
            samples=int(rows["samples"].sum()),
            flagged_values=int(rows["flagged_values"].sum()),
            flagged_samples=int(rows["flagged_samples"].sum()),
            reasons=", ".join(rows["reasons"]),
        )


def _flagged_text(parts: Sequence[tuple[str, _LeftOut]]) -> str:
    flagged = [
        f"{name} {_count(left_out.flagged_values, 'value')} in "
        f"{_count(left_out.flagged_samples, 'sample')} ({left_out.reasons.replace('_', ' ')})"
        for name, left_out in parts
        if left_out.flagged_values > 0
    ]
    return f" Left out as flagged: {', '.join(flagged)}." if flagged else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
