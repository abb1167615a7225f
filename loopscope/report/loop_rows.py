"""What each loop does, in numbers: the loss at h(t) beside the geometry, row by row."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from loopscope.analysis.tables import Tables, aggregate
from loopscope.figures import Panel, choose, every, loops_of, trained_loops
from loopscope.names import READINGS, block_number, state_number
from loopscope.report.numbers import DASH, estimate

ROWS = 17
"""Rows of a loop; of longer ones some are shown."""

COLUMNS = (
    ("raw", "loss, raw", "nats/token when the coda reads h(t) as it is"),
    ("matched", "loss, matched", "each token of h(t) at its length in h(K)"),
    ("fitted", "loss, fitted", "h(t) through a map to h(K), fitted on other text"),
    ("step", "step", "‖h(t+1)−h(t)‖/‖h(t)‖"),
    ("turn", "turn", "the step without growth in length, ‖ĥ(t+1)−ĥ(t)‖"),
    ("work", "work", "what the core does: the turn from h(t) to its output h_m(t)"),
    ("update", "update", "2‖h_m(t)−h(t)‖/(‖h_m(t)‖+‖h(t)‖), h_m(t) what the core gives"),
    ("mixed", "mixed update", "the same with h(t+1), which enters the next loop, for h_m(t)"),
    ("cka", "CKA", "of h(t) and h(t+1), debiased"),
    ("rank", "effective rank", "of h(t)"),
)
"""Each column: its name, its heading and what stands in it."""


def per_loop(tables: Tables) -> list[dict[str, Any]]:
    """The means of every model, loop by loop.

    Args:
        tables: What was measured.

    Returns:
        One table per model and loop: title, columns that have values and their meanings, rows of t
        with a text for each column, whether t lies beyond the loops that the model runs by itself,
        and whether rows are left out.
    """
    frames = {name: frame for name, *_ in COLUMNS if (frame := _MEANS[name](tables)) is not None}
    loops = []
    for panel in _panels(tables):
        columns = {name: _by_t(panel.rows(frame)) for name, frame in frames.items()}
        columns = {name: by_t for name, by_t in columns.items() if by_t}
        K = trained_loops(tables, panel)
        if not columns or not K:
            continue
        last = max(max(by_t) for by_t in columns.values())
        chosen = every(0, last, ROWS)
        rows = [
            {
                "t": str(t),
                "more": t > K,
                "cells": [estimate(by_t[t]) if t in by_t else DASH for by_t in columns.values()],
            }
            for t in chosen
        ]
        shown = [(head, meaning) for name, head, meaning in COLUMNS if name in columns]
        title = panel.model
        title += f", {panel.loop}" if len(loops_of(tables, panel.model)) > 1 else ""
        title += f", step {panel.step:,}" if panel.step is not None else ""
        shortened = len(chosen) <= last
        loops.append(
            {
                "title": title,
                "columns": [head for head, _ in shown],
                "meanings": [f"{head}: {meaning}" for head, meaning in shown],
                "rows": rows,
                "K": K,
                "shortened": shortened,
            }
        )
    return loops


def _panels(tables: Tables) -> list[Panel]:
    for name in ("update", "rank", "readout", "delta"):
        frame = getattr(tables, name)
        if frame is not None and len(frame):
            return choose(tables, frame, None, name)
    return []


def _by_t(rows: pd.DataFrame) -> dict[int, float]:
    pairs = zip(rows["t"], rows["mean"], strict=True)
    return {int(t): float(mean) for t, mean in pairs if math.isfinite(mean)}


def _losses(reading: str) -> Callable[[Tables], pd.DataFrame | None]:
    def values(tables: Tables) -> pd.DataFrame | None:
        frame = tables.readout
        if frame is None:
            return None
        return aggregate.summarise(frame[frame["reading"].eq(reading)], ["t"])

    return values


def _steps(column: str) -> Callable[[Tables], pd.DataFrame | None]:
    def values(tables: Tables) -> pd.DataFrame | None:
        frame = tables.delta
        return None if frame is None else aggregate.summarise(frame, ["t"], column)

    return values


def _update(tables: Tables) -> pd.DataFrame | None:
    if tables.update is None:
        return None
    stats = aggregate.means(tables.update, "update")
    return _numbered(stats, stats["block"], block_number)


def _cka(tables: Tables) -> pd.DataFrame | None:
    if tables.cka is None:
        return None
    frame = tables.cka
    debiased = frame["kernel"].eq("rbf") & frame["estimator"].eq("debiased")
    stats = aggregate.means(frame[debiased], "cka")
    stats = _numbered(stats, stats["state_a"], state_number)
    after = _numbered(stats, stats["state_b"], state_number)
    return after[after["t"].eq(stats["t"].reindex(after.index) + 1)].assign(
        t=lambda rows: rows["t"] - 1
    )


def _rank(tables: Tables) -> pd.DataFrame | None:
    if tables.rank is None:
        return None
    stats = aggregate.means(tables.rank[tables.rank["measure"].eq("effective")], "rank")
    return _numbered(stats, stats["state"], state_number)


def _numbered(
    stats: pd.DataFrame, names: pd.Series, number: Callable[[str], int | None]
) -> pd.DataFrame:
    """The rows whose name has a number, which becomes t."""
    numbers = [number(str(name)) for name in names]
    rows = stats[[t is not None for t in numbers]]
    return rows.assign(t=[t for t in numbers if t is not None])


_MEANS: dict[str, Callable[[Tables], pd.DataFrame | None]] = {
    **{reading: _losses(reading) for reading in READINGS},
    "step": _steps("value"),
    "turn": _steps("turn"),
    "work": _steps("work"),
    "update": _update,
    "mixed": _steps("mixed"),
    "cka": _cka,
    "rank": _rank,
}
