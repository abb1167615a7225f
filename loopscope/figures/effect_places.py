"""Places of interventions in a figure: their groups, labels, and means with intervals."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from loopscope.analysis.tables import Tables, aggregate
from loopscope.errors import InputError
from loopscope.figures.names import (
    model_label,
    printable,
    source_label,
    state_label,
    step_label,
)
from loopscope.figures.panels import Panel, choose, need, only_model
from loopscope.figures.style import BLUE, VERMILLION
from loopscope.names import block_name

PLACE = ["what", "kind", "t", "how", "routers"]
"""The columns of the table `effect` that tell its cells apart."""

KINDS = {
    "iteration": "iterations",
    "attention": "attention",
    "mlp": "MLP",
    "slot": "slots",
    "write": "writes",
    "read": "reads",
    "edge": "edges of Eq. 7",
    "head": "heads",
    "joint": "several at once",
}
"""Kinds of places in the order of a figure, and what they are called."""

HOWS = {
    "skip": "skip: left out",
    "zero": "zero: set to 0",
    "mean": "mean: the mean of other texts",
    "resample": "resample: that of another text",
    "patch": "patch: that of the source",
    "erase": "erase: without the directions of labels",
    "erase_random": "erase_random: without as many random directions (control)",
}
"""What was done there, in a few words."""

ROUTERS = {"recomputed": ("total", BLUE, "o"), "frozen": ("direct", VERMILLION, "D")}
"""With routers recomputed or frozen: what the effect is called, its colour and marker."""

_SLOT = re.compile(r"(?:(write|read) )?(m\d+)@(-?\d+)")
_PART = re.compile(r"loop(.+?)(?:\.(?:layer(\d+)\.)?(attn|mlp|head)(\d*))?")
_OUTPUT = re.compile(r"h_m(\d+)")


class Mark(NamedTuple):
    """How a place is labelled: by itself, and with the places beside it."""

    group: str
    label: str


def mark(what: str, kind: str, t: int, paths: Sequence[str] = ()) -> Mark:
    """Label a place.

    Args:
        what: Its name.
        kind: Its kind.
        t: Its iteration, −1 for the transition.
        paths: Where each iteration stands in nested loops.

    Returns:
        The label of what it has in common with its neighbours, and its own.
    """
    step = "trans." if t < 0 else step_label(t, paths)
    if kind in ("slot", "write", "read") and (slot := _SLOT.fullmatch(what)):
        return Mark(step, slot[2])
    if kind in ("iteration", "attention", "mlp", "head") and (part := _PART.fullmatch(what)):
        path, layer = printable(part[1]), "" if part[2] is None else f"L{part[2]}"
        step = f"$t={path}$" if path.isdecimal() else path
        if kind == "head":
            return Mark(f"{step} {layer}", part[4])
        return Mark(step, layer) if layer else Mark("", path)
    if kind == "edge" and ">" in what:
        source, _, state = what.partition(">")
        output = _OUTPUT.fullmatch(source)
        if output:
            return Mark(state_label(state), source_label(block_name(int(output[1])), paths))
        return Mark(state_label(state), state_label(source))
    return Mark("", printable(what))


def way_sentence(hows: Sequence[str]) -> str:
    """Say what the ways of intervening are.

    Args:
        hows: Those that a figure shows.

    Returns:
        A sentence.
    """
    ways = [HOWS[how] for how in HOWS if how in hows]
    return f"{'; '.join(ways)}.".capitalize() if ways else ""


def model_rows(tables: Tables, model: str | None) -> tuple[Panel, pd.DataFrame]:
    """Get a model's rows of the table `effect`, those of all its loops together.

    Args:
        tables: What was measured.
        model: The model's name; None where the table holds one.

    Returns:
        The panel, that of its first loop, and the rows, under that loop's name.

    Raises:
        InputError: if the table is missing, the model is not in it, or at several steps.
    """
    frame = need(tables, "effect")
    model = only_model(frame, model, "effect")
    panels = choose(tables, frame, model, "effect")
    if len({panel.step for panel in panels}) > 1:
        titles = "; ".join(panel.title for panel in panels)
        raise InputError(
            f"this figure shows one state of a model, but the table 'effect' holds {model!r} at "
            f"several steps: {titles}. Select the rows of one step first."
        )
    if len(panels) == 1:
        return panels[0], panels[0].rows(frame)
    panel = replace(panels[0], title=model_label(model))
    rows = pd.concat([each.rows(frame) for each in panels])
    return panel, rows.assign(loop=panel.loop)


def kinds_of(frame: pd.DataFrame) -> list[str]:
    """List the kinds of places in a table, in the order of a figure.

    Args:
        frame: The table `effect`, or some of its rows.

    Returns:
        The kinds that are places; controls are none.
    """
    held = list(dict.fromkeys(frame["kind"].astype(str)))
    others = [kind for kind in held if kind not in KINDS and kind != "control"]
    return [kind for kind in [*KINDS, *others] if kind in held]


def place_means(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Average a column over the samples, with its 95 % interval by document.

    Args:
        rows: One model's rows of the table `effect`.
        column: What is averaged.

    Returns:
        One row per place, way and kind of effect, in the table's order: mean, low, high (Student's
        t on the cluster-robust error; both are the mean of one cluster), n, n_flagged.
    """
    stats = aggregate.with_errors(rows, PLACE, column)
    clusters = stats["clusters"].to_numpy(dtype=np.float64)
    several = clusters > 1
    half = np.zeros(len(stats))
    error = stats["error"].to_numpy(dtype=np.float64)[several]
    half[several] = student.ppf(0.975, clusters[several] - 1) * error
    mean = stats["mean"].to_numpy(dtype=np.float64)
    return stats.assign(low=mean - half, high=mean + half)


def linear_part(values: pd.Series | np.ndarray) -> float:
    """Choose where an axis of effects stops being linear: two decades below the largest.

    Args:
        values: The effects of any sign, ends of intervals included.

    Returns:
        A power of ten; 1 where there is no effect.
    """
    largest = np.nanmax(np.abs(np.asarray(values, dtype=np.float64)), initial=0.0)
    return 1.0 if largest == 0 else float(10.0 ** (np.floor(np.log10(largest)) - 2))
