"""One text under the router: the weight of every slot, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from loopscope.analysis.tables import aggregate
from loopscope.figures.names import step_label, token_label
from loopscope.figures.panels import Panel, say_unsound
from loopscope.figures.style import TINY, heat_map
from loopscope.figures.ticks import every

TOKENS_SHOWN = 40
LINES_SHOWN = 240
"""Rows of slots for which there is room; of more steps than fit in them, some are shown."""

_GAP = 1.0  # empty rows between two steps


@dataclass(frozen=True, kw_only=True)
class Step:
    """The weights of one step: slot × token."""

    t: int
    weights: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """All steps of one router kind on one text; paths say where they stand in nested loops."""

    kind: str
    steps: tuple[Step, ...]
    tokens: tuple[str, ...]
    paths: tuple[str, ...] = ()


def token_rows(tokens: pd.DataFrame | None, panel: Panel) -> list[TokenRow]:
    """Arrange the token table of one model for drawing.

    Args:
        tokens: `tables.tokens`, or None.
        panel: Which model.

    Returns:
        One row for write and one for read, at most `TOKENS_SHOWN` tokens each; empty without data.
    """
    if tokens is None:
        return []
    shown = shown_tokens(tokens, panel)
    rows = []
    for kind in ("write", "read"):
        part = shown[shown["kind"].eq(kind)]
        if part.empty:
            continue
        part = part.assign(slot=part["target"].astype(str).str[1:].astype(int))
        slots = part["slot"].nunique()
        steps = [
            Step(
                t=t,
                weights=part[part["t"].eq(t)]
                .pivot(index="slot", columns="pos", values="value")
                .to_numpy(np.float64),
            )
            for t in _fitting(sorted(part["t"].unique().tolist()), LINES_SHOWN // slots)
        ]
        texts = part.drop_duplicates("pos").sort_values("pos")["token"].astype(str)
        row = TokenRow(kind=kind, steps=tuple(steps), tokens=tuple(texts), paths=panel.paths)
        rows.append(row)
    return rows


def _fitting(steps: list[int], most: int) -> list[int]:
    """The transition and some of the iterations, if all are more than fit."""
    if len(steps) <= most:
        return steps
    before = [t for t in steps if t < 0]
    kept = every(0, steps[-1], max(2, most - len(before)))
    return [*before, *(t for t in steps if t in kept)]


def shown_tokens(tokens: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """Select the first `TOKENS_SHOWN` tokens of one panel; values that are not sound become NaN.

    Args:
        tokens: `tables.tokens`.
        panel: Which model and loop.

    Returns:
        Its rows.
    """
    rows = panel.rows(tokens)
    rows = rows[rows["pos"] < TOKENS_SHOWN]
    return rows.assign(value=rows["value"].where(aggregate.sound(rows)))


def draw_tokens(ax: Axes, row: TokenRow, norm: Normalize, *, show_tokens: bool) -> None:
    """Draw one heat map per step, stacked, slots downwards and tokens to the right.

    Args:
        ax: Where to draw.
        row: What to draw.
        norm: The colour range.
        show_tokens: Whether the tokens' texts stand below.
    """
    slots, width = row.steps[0].weights.shape
    names: list[str] = []
    places: list[float] = []
    # As many slot labels as keep half a line's distance in the height that the figure gives.
    stride = max(1, round(len(row.steps) * slots / 30))
    for number, step in enumerate(row.steps):
        offset = number * (slots + _GAP)
        heat_map(
            ax,
            np.ma.masked_invalid(step.weights),
            norm,
            top=offset,
            lines=0.25 if stride == 1 else 0.0,
        )
        shown = [b for b in range(slots) if b % stride == 0]
        places += [offset + b + 0.5 for b in shown]
        names += [f"m{b}" for b in shown]
        ax.text(
            -0.045,
            offset + slots / 2,
            step_label(step.t, row.paths),
            transform=ax.get_yaxis_transform(),
            ha="right",
            va="center",
        )
    ax.set_xlim(0, width)
    ax.set_ylim(len(row.steps) * (slots + _GAP) - _GAP, 0)
    ax.set_yticks(places, names, fontsize=TINY - 0.5)
    weights = np.concatenate([step.weights for step in row.steps])
    if not np.isfinite(weights).any():
        say_unsound(ax, weights.size)
    ax.set_title(f"{row.kind} weights, token by token", loc="left")
    name_tokens(ax, row.tokens if show_tokens else ())


def name_tokens(ax: Axes, tokens: Sequence[str], *, left: float = 0.0) -> None:
    """Write tokens below their columns.

    Args:
        ax: Where columns are one wide.
        tokens: The decoded tokens; none writes nothing.
        left: Where the first column begins.
    """
    labels = [token_label(t) for t in tokens]
    ax.set_xticks(left + np.arange(len(labels)) + 0.5, labels, rotation=90, fontsize=TINY + 0.5)
