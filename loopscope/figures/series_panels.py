"""Signs of collapse over training: one small panel per sign, one line per run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loopscope.errors import InputError
from loopscope.figures.courses import Look, legend_line, line_looks
from loopscope.figures.names import model_label, printable, short_count
from loopscope.figures.notes import note
from loopscope.figures.panels import Panel, shortened, wrapped
from loopscope.figures.style import PAGE_WIDTH, SMALL, Figure, new_figure, style
from loopscope.names import KEYS

COLUMNS = 4
_NAME = 48  # letters of a run's name
_MARKED = 16  # steps that each have a marker
_SETTLED = 0.1  # the share of training that may leave a panel
_MANY = 5  # checkpoints that must be left for that
_WORTH = 4.0  # by how much it would have to widen the panel
_FAR = 8.0  # the last step over the middle one, from which the axis is logarithmic


def signs_of(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Read the signs of a series from a summary.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        model, step, loop, sign, mean, low, high, n; a row per checkpoint with a step and sign.
    """
    rows = [
        {
            "model": entry["model"], "step": entry["step"], "loop": entry["loop"], "sign": sign,
            "mean": _number(value["mean"]), "low": _number(value["low"]),
            "high": _number(value["high"]), "n": value["n"],
        }
        for entry in summary["checkpoints"] if entry["step"] is not None
        for sign, value in entry["measures"].items()
    ]  # fmt: skip
    columns = [*KEYS, "sign", "mean", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def series(
    signs: Any,
    entries: Sequence[Mapping[str, Any]] = (),
    measures: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Draw every sign of collapse over training, one line per run and loop.

    Bands are 95 % intervals of the mean. A vertical line stands where a verdict sets in, after
    the span in which it did so; a cross at the lower edge is a checkpoint that is missing.

    Args:
        signs: What `compare` gave; or a frame with the columns model, step, loop, sign, mean, low,
            high, n (rows without a step are left out), and the rest of its summary:
        entries: The `series` of a summary: model, loop, missing, onset.
        measures: The `measures` of a summary, for titles and units.

    Returns:
        The figure.

    Raises:
        InputError: if no sign has a value at any step.
    """
    if not isinstance(signs, pd.DataFrame):
        summary = signs.summary()
        return series(signs_of(summary), summary["series"], summary["measures"])
    frame = signs[signs["step"].notna()].astype({"model": str, "loop": str, "sign": str})
    sound = frame[frame["n"].gt(0) & frame["mean"].notna()]
    facts = {m["name"]: m for m in measures}
    drawn = set(sound["sign"])
    names = [n for n in dict.fromkeys([*facts, *sound["sign"].unique()]) if n in drawn]
    if not names:
        raise InputError("no sign of collapse has a value at any step; a series needs checkpoints.")
    runs = _runs(frame)
    looks = {
        (p.model, p.loop): look for p, look in zip(runs, line_looks({}, runs), strict=True)
    }  # fmt: skip
    entries = [e for e in entries if (e["model"], e["loop"]) in looks]
    with style():
        fig, axes = _page(len(names), runs)
        cut = []
        for ax, name in zip(axes, names, strict=False):
            sign_facts = facts.get(name, {})
            title = str(sign_facts.get("title") or name.replace("_", " "))
            ax.set_title(wrapped(printable(title), 27), fontsize=SMALL)
            ax.set_ylabel(printable(str(sign_facts.get("unit") or "")), fontsize=SMALL)
            if _draw_sign(ax, sound[sound["sign"].eq(name)], runs, looks):
                cut.append(title)
        _steps_axis(axes[: len(names)], sound["step"], log=_logarithmic(sound["step"]))
        for ax in axes[: len(names)]:
            _events(ax, entries, looks)
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        _add_legend(fig, runs, looks)
        note(fig, *_sentences(entries, cut, sound))
    return fig


def _draw_sign(
    ax: Axes, rows: pd.DataFrame, runs: Sequence[Panel], looks: Mapping[Any, Look]
) -> bool:
    """Draw one sign of every run; whether the beginning is cut off."""
    for run in runs:
        line = rows[rows["model"].eq(run.model) & rows["loop"].eq(run.loop)]
        _draw(ax, line.sort_values("step"), looks[run.model, run.loop], run.title)
    return _fit(ax, rows)


def _add_legend(fig: Figure, runs: Sequence[Panel], looks: Mapping[Any, Look]) -> None:
    titles = [run.title for run in runs]
    letters = max(map(len, titles))
    fig.legend(
        [legend_line(looks[run.model, run.loop]) for run in runs], titles,
        loc="outside upper center", handlelength=2.4,
        ncols=max(1, min(len(titles), int(PAGE_WIDTH // (0.5 + 0.065 * letters)))),
    )  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _runs(frame: pd.DataFrame) -> list[Panel]:
    pairs = frame[["model", "loop"]].drop_duplicates()
    several = set(pairs["model"][pairs["model"].duplicated()])
    return [
        Panel(
            model=model, step=None, loop=loop,
            title=shortened(
                model_label(model) + (f", {printable(loop)}" if model in several else ""), _NAME
            ),
        )
        for model, loop in pairs.itertuples(index=False)
    ]  # fmt: skip


def _page(panels: int, runs: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    fig = new_figure(max(3.4, PAGE_WIDTH * columns / COLUMNS), rows * 1.4 + 0.7 + 0.06 * len(runs))
    axes = fig.subplots(rows, columns, sharex=True, squeeze=False)
    return fig, list(axes.flat)


def _draw(ax: Axes, rows: pd.DataFrame, look: Look, title: str) -> None:
    if rows.empty:
        return
    step = rows["step"].to_numpy(dtype=float)
    ax.fill_between(
        step, rows["low"], rows["high"], color=look["color"], alpha=0.18, linewidth=0
    )  # fmt: skip
    ax.plot(
        step, rows["mean"], label=title, markersize=2.4, linewidth=1.0, markeredgewidth=0.6,
        markevery=max(1, -(-len(rows) // _MARKED)), **look,
    )  # fmt: skip


def _fit(ax: Axes, rows: pd.DataFrame) -> bool:
    """Fit a panel to what comes after the beginning, where that would else be flat."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    ax.grid(axis="y")
    later = rows[rows["step"] >= _SETTLED * rows["step"].max()]
    all_low, all_high = _span(rows)
    low, high = _span(later)
    few = later["step"].nunique() < _MANY
    if few or not all_high - all_low > _WORTH * (high - low) > 0:
        room = 0.06 * (all_high - all_low) or 0.05 * abs(all_high) or 0.05
        ax.set_ylim(all_low - room, all_high + room)
        return False
    room = 0.5 * (high - low)
    ax.set_ylim(max(all_low - room, low - room), min(all_high + room, high + room))
    return True


def _span(rows: pd.DataFrame) -> tuple[float, float]:
    low = rows["low"].fillna(rows["mean"]).min()
    high = rows["high"].fillna(rows["mean"]).max()
    return float(low), float(high)


def _logarithmic(steps: pd.Series) -> bool:
    positive = np.unique(steps.to_numpy(dtype=float))
    positive = positive[positive > 0]
    return bool(len(positive) > 3 and positive[-1] > _FAR * np.median(positive))


def _steps_axis(axes: Sequence[Axes], steps: pd.Series, *, log: bool) -> None:
    values = steps.to_numpy(dtype=float)
    for number, ax in enumerate(axes):
        if log:
            ax.set_xscale("symlog", linthresh=float(values[values > 0].min()))
            ax.set_xlim(min(0.0, values.min()), values.max() * 1.15)
        else:
            room = 0.04 * (values.max() - values.min()) or 0.5
            ax.set_xlim(values.min() - room, values.max() + room)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        ax.xaxis.set_major_formatter(lambda value, _: short_count(max(value, 0)))
        if number + COLUMNS >= len(axes):
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("training step", fontsize=SMALL)


def _events(ax: Axes, entries: Sequence[Mapping[str, Any]], looks: Mapping[Any, Look]) -> None:
    for number, entry in enumerate(entries):
        color = looks[entry["model"], entry["loop"]]["color"]
        if onset := entry["onset"]:
            if onset["after"] is not None:
                ax.axvspan(onset["after"], onset["step"], color=color, alpha=0.12, linewidth=0)
            ax.axvline(onset["step"], color=color, linewidth=0.9, linestyle=(0, (3, 2)))
        if missing := entry["missing"]:
            ax.plot(
                missing, [0.03 + 0.05 * (number % 4)] * len(missing), linestyle="none", marker="x",
                markersize=2.6, markeredgewidth=0.7, color=color, label="_missing",
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip


def _sentences(
    entries: Sequence[Mapping[str, Any]], cut: Sequence[str], sound: pd.DataFrame
) -> list[str]:
    sentences = ["Lines: mean over samples, bands: its 95 % interval."]
    onsets = [
        f"{_name(e, entries)} {e['onset']['verdict']} from step {e['onset']['step']:,}"
        + (f" (not yet at {e['onset']['after']:,})" if e["onset"]["after"] is not None else "")
        for e in entries
        if e["onset"]
    ]
    if onsets:
        sentences.append(f"Vertical lines: {'; '.join(onsets)}.")
    if any(e["missing"] for e in entries):
        sentences.append("×: missing or unreadable checkpoints.")
    if cut:
        sentences.append(
            f"The first {100 * _SETTLED:.0f}\u00a0% of training may lie outside the panels "
            f"{', '.join(printable(title) for title in cut)}."
        )
    n = int(sound["n"].max())
    sentences.append(f"n = {n} sample{'' if n == 1 else 's'}.")
    return sentences


def _name(entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    several = sum(e["model"] == entry["model"] for e in entries) > 1
    name = model_label(entry["model"])
    return shortened(name + (f", {printable(entry['loop'])}" if several else ""), _NAME)
