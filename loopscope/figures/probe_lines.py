"""What the states hold: a linear probe's score along the loop, between its controls."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import t as student

from loopscope.analysis.tables import Tables, aggregate, model_record
from loopscope.errors import unknown_name
from loopscope.figures.courses import Look
from loopscope.figures.names import printable, state_label
from loopscope.figures.notes import note, options_note, samples_note, states_note
from loopscope.figures.panels import Panel, choose, need, page, say_unsound
from loopscope.figures.style import BLUE, GREEN, GREY, INK, ORANGE, Figure, style
from loopscope.figures.ticks import labelled

MEANINGS = {
    "current": "class of the token",
    "previous": "class of the token before",
    "next": "class of the next token",
    "position": "position of the token",
    "indentation": "indentation of the line",
    "brackets": "open brackets",
}
"""Built-in labels in words."""

_LOOKS: dict[str, Look] = {
    "none": {"color": BLUE, "marker": "o", "linestyle": "-", "zorder": 4},
    "types": {"color": ORANGE, "marker": "s", "linestyle": "--"},
    "untrained": {"color": GREEN, "marker": "^", "linestyle": "-.", "markerfacecolor": "white"},
    "shuffled": {"color": GREY, "marker": "x", "linestyle": ":"},
}
_NAMES = {
    "none": "probe", "types": "control task", "untrained": "untrained twin",
    "shuffled": "shuffled labels",
}  # fmt: skip
_LABELS = 8  # numbered targets that have a label
_LEAST = -0.3  # R² below this is not shown
_GAIN = 0.12


def probe(
    tables: Tables,
    models: Sequence[str] | str | None = None,
    labels: Sequence[str] | str | None = None,
) -> Figure:
    """Draw the scores of linear probes along the loop, a panel per model and labels.

    The score on held-out documents with its 95 % interval by document, between what it has to be
    held against: the same probe on a control task (Hewitt & Liang 1909.03368; shaded between the
    two: selectivity), on the untrained twin, on shuffled labels, on h_emb (thin line), and the
    score of a constant guess. A probe shows what is there, not what the model uses.

    Args:
        tables: What was measured; needs `probe`.
        models: Names in the order of the panels; None takes all.
        labels: Which labels; None takes all.

    Returns:
        The figure.

    Raises:
        InputError: if the table is missing, or a model or labels are not in it.
    """
    frame = need(tables, "probe")
    held = [str(name) for name in frame["labels"].unique()]
    names = held if labels is None else [labels] if isinstance(labels, str) else list(labels)
    for name in names:
        if name not in held:
            raise unknown_name("labels", name, held)
    frame = frame[frame["labels"].isin(names)]
    drawn = [
        (panel, name)
        for name in names
        for panel in choose(tables, frame[frame["labels"].eq(name)], models, "probe")
    ]
    panels = [panel for panel, _ in drawn]
    stats = aggregate.with_errors(frame, ["labels", "target", "control"], "score")
    guesses = aggregate.with_errors(frame, ["labels", "target", "control"], "baseline")
    several = len(names) > 1
    with style():
        titled = [_titled(panel, name, several) for panel, name in drawn]
        most = max(panel.rows(frame)["target"].nunique() for panel in panels)
        width = min(7.0, max(2.2, 0.5 + 0.22 * most))
        sheet = page(titled, width=width, height=2.1, extra=1.15, widest=3)
        for ax, (panel, name) in zip(sheet.axes, drawn, strict=True):
            rows, guess = (panel.rows(part[part["labels"].eq(name)]) for part in (stats, guesses))
            _draw_panel(ax, rows, guess)
        _share_scale(sheet.axes, [name for _, name in drawn])
        for ax, (_, name) in zip(sheet.axes, drawn, strict=True):
            if ax in sheet.leftmost:
                ax.set_ylabel(_score_label(frame, name))
        _add_legend(sheet.fig, frame)
        note(
            sheet.fig,
            "Mean over held-out samples, bands: its 95 % interval by document. A probe shows what "
            "is there, not what is used.",
            _control_note(tables, panels, names) if frame["control"].eq("types").any() else "",
            _fits_note(tables, panels),
            states_note(panels),
            samples_note(frame, list(dict.fromkeys(panels)), "score"),
            options_note(tables, panels, "probe"),
        )
    return sheet.fig


def _titled(panel: Panel, name: str, several: bool) -> Panel:
    title = f"{panel.title}: {printable(name)}" if several else panel.title
    return Panel(model=panel.model, step=panel.step, loop=panel.loop, title=title)


def _draw_panel(ax: Axes, rows: pd.DataFrame, guess: pd.DataFrame) -> None:
    order = list(dict.fromkeys(rows["target"].astype(str)))
    lines = {
        control: _line(rows[rows["control"].eq(control)], order)
        for control in _LOOKS
        if rows["control"].eq(control).any()
    }
    if not any(np.isfinite(mean).any() for mean, _ in lines.values()):
        say_unsound(ax, int(rows["n_flagged"].sum()))
    x = np.arange(len(order))
    for kind in dict.fromkeys(map(_kind, order)):
        part = np.array([_kind(target) == kind for target in order])
        if "types" in lines:
            probe, control = lines["none"][0][part], lines["types"][0][part]
            ax.fill_between(
                x[part], control, probe, where=probe > control, interpolate=True,
                color=BLUE, alpha=0.12, linewidth=0,
            )  # fmt: skip
        for control, (mean, half) in lines.items():
            look = _LOOKS[control]
            low, high = mean - half, mean + half
            ax.fill_between(
                x[part], low[part], high[part], color=look["color"], alpha=0.2, linewidth=0
            )
            ax.plot(
                x[part], mean[part], markersize=3.2, markeredgewidth=0.8, label=_NAMES[control],
                **look,
            )  # fmt: skip
    constant, _ = _line(guess[guess["control"].eq("none")], order)
    ax.plot(x, constant, color=INK, linewidth=0.7, linestyle=(0, (1, 1)), label="guess", zorder=1)
    if "h_emb" in order:
        ax.axhline(
            lines["none"][0][order.index("h_emb")], color=BLUE, linewidth=0.6, zorder=1,
            label="h_emb",
        )  # fmt: skip
    _name_targets(ax, order)


def _line(rows: pd.DataFrame, order: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half its 95 % interval (Student's t, by document) of each target."""
    rows = rows.set_index(rows["target"].astype(str)).reindex(order)
    clusters = rows["clusters"].fillna(0).to_numpy(np.float64)
    half = np.zeros(len(order))
    several = clusters > 1
    error = rows["error"].to_numpy(np.float64)[several]
    half[several] = student.ppf(0.975, clusters[several] - 1) * error
    return rows["mean"].to_numpy(np.float64), half


def _kind(target: str) -> str:
    """What a line connects: states, core outputs, one slot, a router."""
    if target in ("h_emb", "h_out") or re.fullmatch(r"h\d+", target):
        return "h"
    return "h_m" if target.startswith("h_m") else target.partition("@")[0]


def _target_label(target: str) -> str:
    if match := re.fullmatch(r"h_m(\d+)", target):
        return rf"$h_m({match[1]})$"
    if match := re.fullmatch(r"w_(write|read)@(-?\d+)", target):
        return f"{match[1]} {'pre' if match[2] == '-1' else match[2]}"
    if match := re.fullmatch(r"(m\d+)@(-?\d+)", target):
        return f"{match[1]} {'pre' if match[2] == '-1' else match[2]}"
    return state_label(target)


def _name_targets(ax: Axes, order: Sequence[str]) -> None:
    shown = labelled(order, _LABELS)
    ax.set_xticks([order.index(target) for target in shown], [_target_label(t) for t in shown])
    if len(shown) > 7:
        ax.tick_params(axis="x", rotation=90)
    ax.set_xlim(-0.4, len(order) - 0.6)
    ax.grid(axis="y")


def _share_scale(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """One range of scores for the panels of the same labels."""
    for name in dict.fromkeys(names):
        alike = [ax for ax, other in zip(axes, names, strict=True) if other == name]
        limits = [ax.get_ylim() for ax in alike]
        low, high = min(low for low, _ in limits), max(high for _, high in limits)
        for ax in alike:
            ax.set_ylim(max(low, _LEAST), max(high, _LEAST + _GAIN))


def _score_label(frame: pd.DataFrame, name: str) -> str:
    rows = frame[frame["labels"].eq(name)]
    score = "accuracy" if rows["cross_entropy"].notna().any() else "$R^2$"
    return f"{score}: {MEANINGS.get(name, printable(name))}"


def _add_legend(fig: Figure, frame: pd.DataFrame) -> None:
    controls = [control for control in _LOOKS if frame["control"].eq(control).any()]
    handles: list[Line2D | Patch] = [
        Line2D([], [], markersize=3.2, markeredgewidth=0.8, **_LOOKS[control])
        for control in controls
    ]
    titles = [_NAMES[control] for control in controls]
    if "types" in controls:
        handles.append(Patch(color=BLUE, alpha=0.12, linewidth=0))
        titles.append("selectivity")
    handles.append(Line2D([], [], color=BLUE, linewidth=0.6))
    titles.append(r"probe of $h_\mathrm{emb}$")
    handles.append(Line2D([], [], color=INK, linewidth=0.7, linestyle=(0, (1, 1))))
    titles.append("constant guess")
    fig.legend(
        handles, titles, loc="outside upper center", ncols=_legend_columns(fig),
        columnspacing=1.2, handlelength=2.4,
    )  # fmt: skip


def _legend_columns(fig: Figure) -> int:
    """As many as fit: entries are about as wide as 'untrained twin' with its line."""
    return max(2, min(4, int(fig.get_figwidth() // 1.5)))


def _control_note(tables: Tables, panels: Sequence[Panel], names: Sequence[str]) -> str:
    """What the control task is: with one label per sample, another than with one per token."""
    chosen = model_record(tables.provenance, panels[0].model).options.get("probe") or {}
    given = chosen.get("labels") or {}
    of_samples = [len((given.get(name) or {}).get("shape", ())) == 1 for name in names]
    units = "document" if all(of_samples) else "token type"
    if any(of_samples) and not all(of_samples):
        units += " (with one label per sample: document)"
    return f"Control task: a random label for each {units}; shaded: the probe above it."


def _fits_note(tables: Tables, panels: Sequence[Panel]) -> str:
    """How the probes of the first model were fitted; others of a comparison were alike."""
    chosen = model_record(tables.provenance, panels[0].model).options.get("probe") or {}
    if "folds" not in chosen:
        return ""
    return (
        f"Up to {chosen['probed_tokens']} tokens a sample, {chosen['folds']} folds that keep "
        "documents whole."
    )
