"""What each state would predict: loss, KL and top tokens of the lenses, state by state."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopscope.analysis.tables import Tables
from loopscope.figures.courses import (
    MARKED,
    Course,
    add_legend,
    courses,
    head_panel,
    lacking_note,
    line_page,
)
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import choose, need, say_unsound
from loopscope.figures.style import Figure, style
from loopscope.figures.ticks import every
from loopscope.names import block_number, state_number

LENSES = {
    "logit": r"final norm and unembedding read the state",
    "coda": r"the coda reads the state in place of $h(K)$",
    "tuned": r"through a map to $h_\mathrm{out}$, fitted on other text",
}
"""What each lens does, in a line."""

SHOWN = {
    "loss": "loss (nats per token)",
    "kl_final": "KL(final ‖ lens) (nats)",
    "top_final": "top token is the final one",
}
"""The values that are drawn, and their axes."""

_LABELS, _FEW_LABELS = 10, 6  # numbers on an axis: of one panel, of several beside each other
_NUMBERS = ["low", "mean", "high"]


def lens(tables: Tables, models: Sequence[str] | str | None = None) -> Figure:
    """Draw what would be predicted if the model read out each state now, a column for each lens.

    The logit lens unembeds a state, the coda lens lets the coda read it in place of h(K), the tuned
    lens maps it first. Rows: the loss, the KL divergence of the lens's prediction from the final
    one, the share of tokens at which both have the same top token. A lens that is far off does not
    say that a state lacks the answer: it may hold it in another basis.

    One line per model: the mean over samples with its 95 % interval. Beyond the trained number of
    loops, where it was measured, a line is dotted.

    Args:
        tables: What was measured; needs `lens`.
        models: Names in the order of the legend; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing or a model is not in it.
    """
    frame = need(tables, "lens")
    panels = choose(tables, frame, models, "lens")
    frame = pd.concat([panel.rows(frame) for panel in panels])
    last = max((state_number(str(name)) or 0) for name in frame["state"].unique())
    placed = pd.concat([_placed(panel.rows(frame), last) for panel in panels])
    kinds = [kind for kind in LENSES if frame["kind"].eq(kind).any()]
    models_drawn = courses(tables, placed, panels, "loss")
    with style():
        titles = [course.title for course in models_drawn]
        fig, axes, columns = line_page(titles, len(kinds), height=1.45, rows=len(SHOWN))
        by_kind: dict[str, list[Course]] = {}
        for row, (value, label) in enumerate(SHOWN.items()):
            of_row = axes[row * len(kinds) : (row + 1) * len(kinds)]
            for ax, kind in zip(of_row, kinds, strict=True):
                rows = placed[placed["kind"].eq(kind)]
                by_kind[kind] = courses(tables, rows, panels, value)
                for course in by_kind[kind]:
                    _draw(ax, course, rows)
                if not any(course.sound for course in by_kind[kind]):
                    flagged = sum(int(c.rows["n_flagged"].sum()) for c in by_kind[kind])
                    say_unsound(ax, flagged)
                if row == 0 and (len(kinds) > 1 or kind != "logit"):
                    head_panel(ax, f"{kind} lens", LENSES[kind])
                ax.grid(axis="y")
            of_row[0].set_ylabel(label)
            _fit(of_row[0], value)
        _name_states(axes[0], placed, last, _LABELS if len(kinds) == 1 else _FEW_LABELS)
        for ax in axes[-len(kinds) :]:
            ax.set_xlabel("state")
        add_legend(fig, models_drawn, columns)
        note(
            fig,
            "Lines: mean over samples, bands: its 95 % interval.",
            "Numbers: $h(t)$ after $t$ loops"
            + (", between them layer after layer." if (placed["t"] % 1).any() else "."),
            "Dotted: more loops than the model runs." if placed["beyond"].any() else "",
            "Dashed: untrained." if any(c.look["linestyle"] == "--" for c in models_drawn) else "",
            "A lens shows what can be read of a state, not what the model uses.",
            options_note(tables, panels, "lens"),
            states_note(panels),
            lacking_note({f"{kind} lens": lines for kind, lines in by_kind.items()}),
            samples_note(placed, panels, "loss"),
        )
    return fig


def places(states: Sequence[str], last: int) -> dict[str, float]:
    """Put states on an axis: h_emb at −1, h(t) at t, h_out behind all, layers between them.

    Args:
        states: Names of states and layers (`core1.0`) of a model, in the order of computation.
        last: The largest t of all models.

    Returns:
        State → its place.
    """
    layers: dict[str, list[str]] = {}
    for name in states:
        block, dot, _ = name.rpartition(".")
        if dot:
            layers.setdefault(block, []).append(name)
    numbers = [t for name in states if (t := state_number(name)) is not None]
    at: dict[str, float] = {"h_emb": -1.0, "h_out": last + 1.0}
    for name in states:
        block, dot, _ = name.rpartition(".")
        if (t := state_number(name)) is not None:
            at[name] = float(t)
        elif dot:
            t = block_number(block)
            begin = -1.0 if block == "prelude" else float(max(numbers) if t is None else t)
            width = last + 1.0 - begin if block == "coda" else 1.0
            inner = layers[block]
            at[name] = begin + width * (inner.index(name) + 1) / (len(inner) + 1)
    return {name: at[name] for name in states}


def _placed(rows: pd.DataFrame, last: int) -> pd.DataFrame:
    """The rows of one model with the place of each state as `t`."""
    own = [str(name) for name in rows.loc[~rows["beyond"], "state"].unique()]
    more = [str(name) for name in rows.loc[rows["beyond"], "state"].unique()]
    at = {**places(more, last), **places(own, last)}
    return rows.assign(t=rows["state"].astype(str).map(at))


def _draw(ax: Axes, course: Course, rows: pd.DataFrame) -> None:
    """Draw one line with its band: whole up to the model's own states, dotted beyond them."""
    of_model = course.panel.rows(rows)
    further = set(of_model.loc[of_model["beyond"], "t"])
    drawn = course.rows[course.rows["n"] > 0]
    beyond = drawn["t"].isin(further)
    own, more = drawn[~beyond], drawn[beyond]
    ends = own[own["t"] < more["t"].min()].tail(1) if len(more) else own.head(0)
    parts = {
        course.title: (own, course.look | {"markersize": 3.0, "markeredgewidth": 0.7}),
        "_more": (pd.concat([ends, more]), course.look | {"linestyle": ":", "marker": "none"}),
    }
    for label, (part, look) in parts.items():
        if part.empty or (label == "_more" and more.empty):
            continue
        ax.fill_between(
            part["t"], part["low"], part["high"], color=course.look["color"], alpha=0.13,
            linewidth=0,
        )  # fmt: skip
        ends_of_loops = np.flatnonzero(part["t"].to_numpy() % 1 == 0)  # layers have no markers
        marked = ends_of_loops[:: max(1, -(-len(ends_of_loops) // MARKED))]
        ax.plot(part["t"], part["mean"], label=label, markevery=marked.tolist(), **look)


def _fit(ax: Axes, value: str) -> None:
    """Fit the y-axis of a row."""
    if value == "top_final":
        ax.set_ylim(0, 1.03)
    elif value == "kl_final":
        ax.set_ylim(bottom=0)


def _name_states(ax: Axes, placed: pd.DataFrame, last: int, most: int) -> None:
    """Label the x-axis, which all panels share."""
    drawn = {str(name) for name in placed["state"].unique()}
    numbers = sorted(t for name in drawn if (t := state_number(name)) is not None)
    ticks: dict[float, str] = {-1.0: r"$h_\mathrm{emb}$"} if "h_emb" in drawn else {}
    if numbers:
        ticks |= {float(t): str(t) for t in every(numbers[0], numbers[-1], most)}
    if "h_out" in drawn:
        ticks[last + 1.0] = r"$h_\mathrm{out}$"
    ax.set_xticks(list(ticks), list(ticks.values()))
    left, right = placed["t"].min(), placed["t"].max()
    room = 0.04 * max(right - left, 1.0)
    ax.set_xlim(left - room, right + room)


__all__ = ["LENSES", "SHOWN", "lens", "places"]
