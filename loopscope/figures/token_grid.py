"""One text under the lens: the top token of every state at every position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from loopscope.analysis.tables import Tables, aggregate
from loopscope.errors import InputError
from loopscope.figures.lens_lines import LENSES
from loopscope.figures.names import printable, state_label, token_label
from loopscope.figures.notes import note
from loopscope.figures.panels import choose_one, need, only_model, say_unsound, shortened
from loopscope.figures.style import (
    NORMAL,
    PAGE_WIDTH,
    SMALL,
    TINY,
    VERMILLION,
    Figure,
    heat_map,
    new_figure,
    style,
)
from loopscope.figures.ticks import every

POSITIONS = 16
"""Positions for which there is room beside each other."""

BANDS = 2
"""A longer text goes on below, in so many bands, where the page has room for them."""

STATES = 40
"""States for which there is room; of more some are shown."""

_LETTERS = 9  # of a token in a cell
_ROW, _COLUMN, _HEAD = 0.165, 0.41, 0.42  # inches of a cell, and of what stands above a grid
_WIDE = frozenset("=+<>~#@%&mwMW—…")
_PAGE = 8.0  # inches for all grids
_TITLE = 70  # letters of a model's name


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What one lens reads: state × position.

    Attributes:
        kind: The lens.
        states: Names in the order of computation, those beyond the model's own last.
        tokens: The top token of each cell; None where there is none.
        probability: Its probability, NaN where there is none.
        settled: For each position the state from which on the final top token stays on top.
        inputs: The token at each position.
        truth: The token that follows it; None for the last.
        own: How many of the states are the model's own; the others take more iterations.
        first: Number of the first position.
    """

    kind: str
    states: tuple[str, ...]
    tokens: np.ndarray
    probability: np.ndarray
    settled: tuple[int, ...]
    inputs: tuple[str, ...]
    truth: tuple[str | None, ...]
    own: int
    first: int


def lens_tokens(
    tables: Tables, model: str | None = None, *, first: int = 0, loop: str | None = None
) -> Figure:
    """Write the token that each lens puts first into a grid of states and positions.

    Colour is the token's probability; bold is the token that follows in the text. The framed cell
    of a column is where the final answer comes to stay: from that state on it is on top.

    Args:
        tables: What was measured; needs `lens_tokens`.
        model: Whose; the only one, or the first, when not given.
        first: The first position shown, of as many as fit on the page.
        loop: The loop; None where there is one.

    Returns:
        The figure, a grid for each lens.

    Raises:
        InputError: if the table is missing, the model is not in it, or there is no such position.
    """
    frame = need(tables, "lens_tokens")
    model = only_model(frame, model, "lens_tokens")
    panel = choose_one(tables, frame, model, loop, "lens_tokens")
    rows = panel.rows(frame)
    length = int(rows["pos"].max()) + 1
    if not 0 <= first < length:
        raise InputError(f"first is {first}; the text has positions 0 to {length - 1}.")
    kinds = [kind for kind in LENSES if rows["kind"].eq(kind).any()]
    grids = [grid(rows, kind, first) for kind in kinds]
    left_out = max(
        rows.loc[rows["kind"].eq(g.kind), "state"].nunique() - len(g.states) for g in grids
    )
    once = sum(_ROW * len(g.states) + _HEAD for g in grids)
    bands = max(1, min(BANDS, -(-(length - first) // POSITIONS), int(_PAGE // once)))
    begins = [first + POSITIONS * band for band in range(bands)]
    grids = [grid(rows, kind, begin) for kind in kinds for begin in begins]
    stop = begins[-1] + len(grids[-1].inputs)
    beyond = any(g.own < len(g.states) for g in grids)
    with style():
        lines = sum(len(g.states) for g in grids)
        room = len(grids[0].inputs)
        width = max(3.3, min(PAGE_WIDTH, 0.6 + _COLUMN * room))
        fig = new_figure(width + 0.4, _ROW * lines + _HEAD * len(grids) + 0.75)
        heights = [_ROW * len(g.states) for g in grids]
        axes = fig.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
        norm = Normalize(0, 1)
        for ax, of_kind in zip(axes, grids, strict=True):
            mesh = _draw(ax, of_kind, norm, heading=of_kind.first == first, room=room)
        bar = fig.colorbar(mesh, ax=list(axes), fraction=0.025, pad=0.012, aspect=30)
        bar.set_label("probability of the top token", fontsize=SMALL)
        bar.outline.set_visible(False)
        fig.suptitle(shortened(panel.title, _TITLE), fontsize=NORMAL, x=0.01, ha="left")
        note(
            fig,
            "Above the cells: the text. In them: the token that the lens puts first as the next "
            "one, bold where the text goes on with it. Framed: from this state on the final top "
            "token stays on top.",
            "Below the gap: more loops than the model runs." if beyond else "",
            f"Shown are positions {first} to {stop - 1} of {length}."
            if stop - first < length
            else "",
            f"{left_out} states between are not shown." if left_out else "",
        )
    return fig


def grid(rows: pd.DataFrame, kind: str, first: int) -> Grid:
    """Arrange what one lens reads of a text.

    Args:
        rows: The rows of `lens_tokens` of one model and loop.
        kind: The lens.
        first: The first position.

    Returns:
        At most `POSITIONS` positions and `STATES` states.
    """
    texts = rows.drop_duplicates("pos").sort_values("pos")
    inputs = dict(zip(texts["pos"], texts["input"].astype(str), strict=True))
    top = rows[rows["kind"].eq(kind) & rows["rank"].eq(1)]
    top = top[top["pos"].between(first, first + POSITIONS - 1)]
    states = [str(name) for name in top["state"].unique()]
    positions = sorted(int(pos) for pos in top["pos"].unique())
    shape = (len(states), len(positions))
    lines = top["state"].astype(str).map({name: i for i, name in enumerate(states)}).to_numpy()
    columns = top["pos"].map({pos: i for i, pos in enumerate(positions)}).to_numpy()
    tokens, probability = np.full(shape, None, dtype=object), np.full(shape, np.nan)
    sound = aggregate.sound(top, "probability").to_numpy()
    tokens[lines[sound], columns[sound]] = top["token"].astype(str).to_numpy()[sound]
    probability[lines[sound], columns[sound]] = top["probability"].to_numpy()[sound]
    beyond = set(top.loc[top["beyond"], "state"].astype(str))
    own = [i for i, name in enumerate(states) if name not in beyond]
    settled = tuple(_settled(tokens[own, column], own) for column in range(len(positions)))
    shown = every(0, len(states) - 1, STATES) if len(states) > STATES else list(range(len(states)))
    return Grid(
        kind=kind, states=tuple(states[i] for i in shown), tokens=tokens[shown],
        probability=probability[shown],
        settled=tuple(next((n for n, i in enumerate(shown) if i >= at), -1) for at in settled),
        inputs=tuple(inputs[pos] for pos in positions),
        truth=tuple(inputs.get(pos + 1) for pos in positions), own=sum(i in own for i in shown),
        first=first,
    )  # fmt: skip


def _settled(tokens: np.ndarray, lines: Sequence[int]) -> int:
    """The line from which on the last token is on top; beyond all where there is none."""
    at = len(tokens) - 1
    if tokens[at] is None:
        return max(lines) + 10**6
    while at > 0 and tokens[at - 1] == tokens[-1]:
        at -= 1
    return lines[at]


def _draw(ax: Axes, of_kind: Grid, norm: Normalize, *, heading: bool, room: int) -> QuadMesh:
    """Draw one grid, states downwards and positions to the right."""
    mesh = heat_map(ax, np.ma.masked_invalid(of_kind.probability), norm)
    height, width = of_kind.probability.shape
    for line in range(height):
        for column in range(width):
            token = of_kind.tokens[line, column]
            if token is not None:
                _write(ax, of_kind, line, column, token, norm)
    for column, line in enumerate(of_kind.settled):
        if 0 <= line < height:
            frame = Rectangle(
                (column, line), 1, 1, fill=False, edgecolor=VERMILLION, linewidth=1.3, zorder=3,
                label="settled",
            )  # fmt: skip
            ax.add_patch(frame)
    if not np.isfinite(of_kind.probability).any():
        say_unsound(ax, of_kind.probability.size)
    if of_kind.own < height:
        ax.axhline(of_kind.own, color="white", linewidth=3.0)
    ax.set_xlim(0, room)
    ax.set_yticks(np.arange(height) + 0.5, [_state(name) for name in of_kind.states])
    texts = [fitting(token) for token in of_kind.inputs]
    ax.xaxis.set_ticks_position("top")
    ax.set_xticks(np.arange(width) + 0.5, texts, fontsize=TINY)
    ax.tick_params(length=0, pad=2)
    for text, label in zip(texts, ax.get_xticklabels(), strict=True):
        label.set_fontsize(_size(text))
    if heading:
        ax.set_title(f"{of_kind.kind} lens: {LENSES[of_kind.kind]}", loc="left")
    return mesh


def _write(ax: Axes, of_kind: Grid, line: int, column: int, token: str, norm: Normalize) -> None:
    """Write a token into its cell, black on light colours and white on dark ones."""
    red, green, blue, _ = ax.collections[0].cmap(norm(of_kind.probability[line, column]))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    label = fitting(token)
    ax.text(
        column + 0.5, line + 0.5, label, ha="center", va="center",
        fontsize=_size(label), color="black" if light else "white",
        weight="bold" if token == of_kind.truth[column] else "normal", in_layout=False,
    )  # fmt: skip


def fitting(token: str) -> str:
    """Write a token so that it fits into a cell, its whitespace visible.

    Args:
        token: The decoded token.

    Returns:
        At most as many letters as have room; characters without a glyph are escaped.
    """
    for width in range(_LETTERS, 1, -1):
        if len(label := token_label(token, width)) <= _LETTERS + 2:
            return label
    return label


def _size(label: str) -> float:
    """The size at which a label stays within its cell, by what letters are wide."""
    ems = sum(0.9 if letter in _WIDE else 0.62 for letter in label)
    return min(TINY, 72 * _COLUMN * 0.92 / max(ems, 1.0))


def _state(name: str) -> str:
    return printable(name) if "." in name else state_label(name)


__all__ = ["Grid", "fitting", "grid", "lens_tokens"]
