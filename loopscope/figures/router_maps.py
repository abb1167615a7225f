"""Router maps: which slots are written and read, and what gates decide, step by step."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from loopscope.analysis.tables import Tables, aggregate
from loopscope.errors import InputError
from loopscope.figures.gate_maps import GateRows, draw_gates, gate_rows, short
from loopscope.figures.names import source_label, state_label, step_label
from loopscope.figures.notes import note, options_note, paths_note, samples_note
from loopscope.figures.panels import Panel, choose_one, need, say_unsound
from loopscope.figures.router_tokens import TokenRow, draw_tokens, token_rows
from loopscope.figures.style import (
    GREY,
    PAGE_WIDTH,
    SMALL,
    TINY,
    Figure,
    cell_text,
    heat_map,
    new_figure,
    style,
)
from loopscope.figures.ticks import labelled
from loopscope.names import block_name, block_order, state_name

WIDE = 9
"""Slots whose mean weights can be printed as decimals; more are printed in percent."""

CELLS = 42
"""Columns of all maps beside each other whose values can be printed at all."""

_CELL = 0.165  # inches per row of a map
_LABELS = 9  # slots or iterations that have a label where not all have
_TITLES = {
    "write": "write weights",
    "read": "read weights",
    "alpha": r"sources of each state, $\alpha$ (Eq. 7)",
}


class Map(NamedTuple):
    """A matrix of mean weights: loop step (or state) × slot (or source)."""

    kind: str
    values: pd.DataFrame
    entropy: pd.Series | None
    flagged: int


def routers(tables: Tables, model: str, loop: str | None = None) -> Figure:
    """Draw where a model writes and reads, what each state is made of, and one text in detail.

    Write and read maps hold the mean weights of MeSH Eq. 3 per step and slot, the transition
    first; the entropy of the weights (nats, mean over tokens) stands at each row's end. The third
    map holds the mean alpha of MeSH Eq. 7, where it is exact: how much of each source is in each
    state. Below, the weights of the first text token by token. Gates (exit gates, token routers)
    follow: the mean probability at each iteration, its entropy, and one text token by token.

    Args:
        tables: What was measured; needs `routing`, shows `tokens` where present.
        model: The model's name.
        loop: Which of its loops; not needed where only one has routers or gates.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, the model or loop is not in it or has neither memory
            slots nor gates, or the table holds several steps of it, or several loops and none is
            given.
    """
    frame = need(tables, "routing")
    panel = choose_one(tables, frame, model, loop, "routing")
    frame = frame[frame["model"].eq(model)]
    stats = panel.rows(aggregate.routing(frame))
    maps = [router_map(stats, kind) for kind in ("write", "read", "alpha")]
    gates = gate_rows(stats, tables.tokens, panel)
    if maps[0].values.empty and maps[1].values.empty and gates is None:
        raise InputError(
            f"{model!r} has no router weights in the table 'routing': it has no memory slots and "
            "no gates. Router figures exist for models with write and read routers, or gates."
        )
    rows = token_rows(tables.tokens, panel)
    by_token = bool(rows) or (gates is not None and bool(gates.texts))
    with style():
        fig = _draw(panel, maps, rows, gates)
        note(
            fig,
            *_sentences(maps, gates),
            paths_note([panel]),
            samples_note(frame, [panel], "mean"),
            options_note(tables, [panel], "routing"),
            _token_sentence(maps, rows, gates)
            if by_token
            else "No token-by-token table was measured.",
        )
    return fig


def _sentences(maps: list[Map], gates: GateRows | None) -> list[str]:
    sentences = []
    if slots := _slots(maps):
        if _readable(maps):
            percent = " in %" if slots > WIDE else ""
            sentences.append(f"Numbers: mean weight over tokens and samples{percent};")
        else:
            sentences.append("Maps: mean weight over tokens and samples;")
        sentences.append(
            f"H: entropy of the weights in nats, uniform over {slots} slots would be "
            f"{np.log(slots):.2f}."
        )
    if gates is not None:
        sentences.append(
            "Gates: mean probability over tokens and samples; H: its binary entropy in nats, "
            f"at most {np.log(2):.2f}."
        )
    return sentences


def _token_sentence(maps: list[Map], rows: list[TokenRow], gates: GateRows | None) -> str:
    what = " and ".join(["weights"] * bool(rows) + ["probabilities"] * (gates is not None))
    steps = max(len(m.values) for m in maps[:2])
    left_out = ", at some of the steps" if rows and len(rows[0].steps) < steps else ""
    sentence = f"{'Bottom' if rows else 'Right'}: first sample, {what} token by token{left_out}."
    if gates is not None and gates.elsewhere:
        names = ", ".join(short(name) for name in gates.elsewhere)
        sentence += f" On positions of their own, hence not by token: {names}."
    return sentence


def router_map(stats: pd.DataFrame, kind: str) -> Map:
    """Turn one model's routing statistics into a matrix.

    Args:
        stats: This model's rows of `aggregate.routing`.
        kind: `write`, `read` or `alpha`.

    Returns:
        t × target in order, NaN where a target does not exist at that step; entropy per t
        (None for alpha); how many weights were left out.
    """
    part = stats[stats["kind"].eq(kind)].assign(target=lambda f: f["target"].astype(str))
    values = part.pivot(index="t", columns="target", values="mean").sort_index()
    values = values[_target_order(values.columns)]
    entropy = None if kind == "alpha" else part.groupby("t")["entropy"].mean()
    return Map(kind, values, entropy, int(part["n_flagged"].sum()))


def _target_order(targets: pd.Index) -> list[str]:
    slots = [t for t in targets if t[:1] == "m" and t[1:].isdigit()]
    blocks = block_order(t for t in targets if t not in slots)
    return [*sorted(slots, key=lambda t: int(t[1:])), *blocks]


def _slots(maps: list[Map]) -> int:
    """Memory slots; 0 for a loop that has gates only."""
    return max(m.values.shape[1] for m in maps[:2])


def _readable(maps: list[Map]) -> bool:
    """Whether values fit into the cells of maps that share a page's width."""
    return sum(m.values.shape[1] for m in maps) <= CELLS


def _draw(panel: Panel, maps: list[Map], rows: list[TokenRow], gates: GateRows | None) -> Figure:
    drawn = [m for m in maps if not m.values.empty]
    heights = _heights(drawn, rows, gates)
    under = 1.2 if rows or (gates is not None and gates.texts) else 0.55
    alone = not drawn and gates is not None and not gates.texts
    fig = new_figure(3.4 if alone else PAGE_WIDTH, sum(heights) + under)
    widths = [m.values.shape[1] + 2 for m in drawn] or [1]
    grid = fig.add_gridspec(len(heights), len(widths), height_ratios=heights, width_ratios=widths)
    norm = Normalize(0.0, 1.0)
    axes: list[Axes] = []
    for column, weights in enumerate(drawn):
        axes.append(fig.add_subplot(grid[0, column]))
        _draw_map(axes[-1], weights, norm, panel, _slots(maps), printed=_readable(maps))
    for place, row in enumerate(rows, start=int(bool(drawn))):
        axes.append(fig.add_subplot(grid[place, :]))
        draw_tokens(axes[-1], row, norm, show_tokens=row is rows[-1])
    if gates is not None:
        axes.append(fig.add_subplot(grid[-1, :]))
        draw_gates(axes[-1], gates, norm)
    bar = fig.colorbar(
        axes[0].collections[0],
        ax=axes,
        aspect=30 if len(heights) > 1 else 15,
        pad=0.01,
        fraction=0.1 if alone else 0.03,
        anchor=(0.0, 1.0),
    )
    names = ["weight"] * bool(drawn) + ["probability"] * (gates is not None)
    bar.set_label(" or ".join(names))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    fig.suptitle(panel.title, fontsize=8.5)
    return fig


def _heights(drawn: list[Map], rows: list[TokenRow], gates: GateRows | None) -> list[float]:
    """Inches of each row of the page: the maps beside each other, each text, the gates."""
    heights = []
    if drawn:
        heights.append(_CELL * max(len(m.values) for m in drawn) + 0.75)
    if rows:
        lines = sum(len(step.weights) for step in rows[0].steps)
        heights += [min(0.075 * lines, 4.2) + 0.2] * len(rows)
    if gates is not None:
        heights.append(max(0.8, min(_CELL * gates.height, 4.2)) + 0.2)
    return heights


def _draw_map(
    ax: Axes, drawn: Map, norm: Normalize, panel: Panel, slots: int, *, printed: bool
) -> None:
    values = drawn.values.to_numpy(dtype=np.float64)
    heat_map(ax, np.ma.masked_invalid(values), norm, lines=0.6 if printed else 0.25)
    percent = slots > WIDE
    if printed:
        cell_text(ax, values, norm, size=TINY - 0.5 * percent, percent=percent)
    if not np.isfinite(values).any():
        say_unsound(ax, drawn.flagged)
    steps = [int(t) for t in drawn.values.index]
    columns = [str(s) for s in drawn.values.columns]
    # the first iteration's label stands beside two others, so the next must be further away
    most = _LABELS if drawn.entropy is not None else _LABELS // 2 + 1
    shown = columns if printed else labelled(columns, most)
    if drawn.entropy is None:
        rows = [state_label(state_name(t + 1)) for t in steps]
        targets = [source_label(s, panel.paths) for s in shown]
    else:
        rows = [step_label(t, panel.paths) for t in steps]
        targets = shown
        _print_entropy(ax, drawn.entropy.loc[steps], values.shape[1] + 0.15)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.set_xticks(
        [columns.index(s) + 0.5 for s in shown],
        targets,
        rotation=90 if drawn.entropy is None or percent else 0,
    )
    if len(shown) < len(columns) and drawn.entropy is None:  # h_emb, prelude, 1st core touch
        names = ax.get_xticklabels()
        names[0].set_horizontalalignment("right")
        names[shown.index(block_name(0))].set_horizontalalignment("left")
    ax.set_title(_TITLES[drawn.kind])


def _print_entropy(ax: Axes, entropy: pd.Series, edge: float) -> None:
    """Write each row's entropy at its end, under an H."""
    ax.text(edge, -0.12, "H", fontsize=SMALL, color=GREY, va="bottom")
    for row, value in enumerate(entropy):
        ax.text(
            edge,
            row + 0.5,
            f"{value:.2f}" if np.isfinite(value) else "n/a",
            fontsize=TINY,
            color=GREY,
            va="center",
        )
