"""Gates (exit gates, token routers): how probable each iteration makes what it decides."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from loopscope.figures.names import printable, step_label
from loopscope.figures.panels import Panel, say_unsound
from loopscope.figures.router_tokens import name_tokens, shown_tokens
from loopscope.figures.style import GREY, SMALL, TINY, cell_text, heat_map

_NAME = 1.5  # rows that a gate's name takes above its own
_TOKENS = 3.0  # columns before the tokens: the mean, its entropy
_LETTERS = 60


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate at the iterations at which it is evaluated.

    Attributes:
        name: The gate.
        steps: What the iterations are called.
        mean: Mean probability of each.
        entropy: Mean binary entropy of each, nats.
        flagged: Values that were left out.
        tokens: Iteration × token of the first sample; None where that was not measured.
    """

    name: str
    steps: tuple[str, ...]
    mean: np.ndarray
    entropy: np.ndarray
    flagged: int
    tokens: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class GateRows:
    """All gates of one loop, and the first tokens of one text."""

    gates: tuple[Gate, ...]
    texts: tuple[str, ...]

    @property
    def elsewhere(self) -> list[str]:
        """Gates that have other positions than the tokens that are shown."""
        return [gate.name for gate in self.gates if self.texts and gate.tokens is None]

    @property
    def height(self) -> float:
        """Rows of the map, those for names among them."""
        names = _NAME * len(self.gates) if len(self.gates) > 1 else 0.0
        return sum(len(gate.steps) for gate in self.gates) + names


def gate_rows(stats: pd.DataFrame, tokens: pd.DataFrame | None, panel: Panel) -> GateRows | None:
    """Arrange the gates of one loop for drawing.

    Args:
        stats: Its rows of `aggregate.routing`.
        tokens: `tables.tokens`, or None.
        panel: Which model and loop.

    Returns:
        The gates, None where there are none.
    """
    part = stats[stats["kind"].eq("gate")].astype({"target": str})
    if part.empty:
        return None
    shown = _gate_tokens(tokens, panel)
    gates = []
    for name, rows in part.groupby("target", sort=False):
        rows = rows.sort_values("t")
        gate = Gate(
            name=str(name),
            steps=tuple(step_label(int(t), panel.paths) for t in rows["t"]),
            mean=rows["mean"].to_numpy(np.float64),
            entropy=rows["entropy"].to_numpy(np.float64),
            flagged=int(rows["n_flagged"].sum()),
            tokens=_by_token(shown, str(name), rows["t"]),
        )
        gates.append(gate)
    texts: tuple[str, ...] = ()
    if shown is not None:
        texts = tuple(shown.drop_duplicates("pos").sort_values("pos")["token"].astype(str))
    return GateRows(gates=tuple(gates), texts=texts)


def _gate_tokens(tokens: pd.DataFrame | None, panel: Panel) -> pd.DataFrame | None:
    if tokens is None:
        return None
    shown = shown_tokens(tokens, panel).astype({"target": str})
    return shown[shown["kind"].eq("gate")]


def _by_token(shown: pd.DataFrame | None, gate: str, t: pd.Series) -> np.ndarray | None:
    """Iteration × token of one gate; None where no token was measured."""
    if shown is None or shown.empty:
        return None
    rows = shown[shown["target"].eq(gate)]
    if rows.empty:  # its positions are not those of the tokens
        return None
    return rows.pivot(index="t", columns="pos", values="value").reindex(t).to_numpy(np.float64)


def draw_gates(ax: Axes, rows: GateRows, norm: Normalize) -> None:
    """Draw the mean of each gate at each iteration and, beside it, one text token by token.

    Args:
        ax: Where to draw.
        rows: What to draw.
        norm: The colour range.
    """
    several = len(rows.gates) > 1
    labels: list[str] = []
    places: list[float] = []
    offset = 0.0
    for gate in rows.gates:
        if several:
            ax.text(0, offset + _NAME - 0.2, short(gate.name), fontsize=SMALL, va="bottom")
            offset += _NAME
        _draw_gate(ax, gate, norm, top=offset, lines=0.25 if rows.height <= 40 else 0.0)
        labels += gate.steps
        places += [offset + row + 0.5 for row in range(len(gate.steps))]
        offset += len(gate.steps)
    ax.set_ylim(offset, 0)
    ax.set_xlim(0, _TOKENS + len(rows.texts))
    ax.set_yticks(places, labels, fontsize=SMALL if len(labels) <= 24 else TINY)
    if not any(np.isfinite(gate.mean).any() for gate in rows.gates):
        say_unsound(ax, sum(gate.flagged for gate in rows.gates))
    name_tokens(ax, rows.texts, left=_TOKENS)
    what = "gates:" if several else f"gate {short(rows.gates[0].name)}:"
    shown = " mean probability, entropy H, token by token"
    ax.set_title(what + (shown if rows.texts else "\nmean probability, entropy H"), loc="left")


def _draw_gate(ax: Axes, gate: Gate, norm: Normalize, *, top: float, lines: float) -> None:
    mean = gate.mean[:, None]
    heat_map(ax, np.ma.masked_invalid(mean), norm, top=top)
    cell_text(ax, mean, norm, top=top)
    for row, value in enumerate(gate.entropy):
        ax.text(
            1.15,
            top + row + 0.5,
            f"{value:.2f}" if np.isfinite(value) else "n/a",
            fontsize=TINY,
            color=GREY,
            va="center",
        )
    if gate.tokens is not None:
        tokens = np.ma.masked_invalid(gate.tokens)
        heat_map(ax, tokens, norm, top=top, left=_TOKENS, lines=lines)


def short(name: str) -> str:
    """A gate's name with its beginning left out where it is long.

    Args:
        name: The name.

    Returns:
        At most 60 characters.
    """
    return printable(name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :])
