"""The verdicts and findings as a reader meets them: word, shape, colour and meaning."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from loopscope.analysis.collapse import LADDER, THRESHOLDS


class Word(NamedTuple):
    """How one verdict is shown.

    Attributes:
        shape: A character that tells it apart without colour.
        color: Of the word on white; at least 4.5 : 1 against it.
        ansi: Its style in a terminal.
        meaning: What it says of a loop beside the conditions on which it is given (`meaning_of`);
            thresholds in backquotes.
    """

    shape: str
    color: str
    ansi: str
    meaning: str = ""


WORDS = {
    "healthy": Word(
        "●", "#00664A", "green",
        "no condition of the other verdicts holds; where its gain was measured, the whole loop "
        "takes at least `little_gain` off the loss",
    ),
    "converging": Word(
        "◆", "#005A8C", "cyan", "on the way to a fixed point, which is no failure",
    ),
    "skewed": Word("◣", "#8A5200", "yellow"),
    "stagnant": Word("■", "#75378F", "magenta"),
    "collapsed": Word("▼", "#B00020", "bold red"),
    "unstable": Word("▲", "#A13B00", "red"),
    "uncertain": Word(
        "?", "#555555", "bold",
        "these samples do not decide: an interval crosses a threshold, a measure is missing, or "
        "there are too few",
    ),
    "no loop": Word(
        "–", "#555555", "dim",
        "nothing is run again with the same weights, so there is nothing to judge",
    ),
}  # fmt: skip
"""By verdict, the best first; `no loop` stands for a verdict of None."""

FINDING = Word("!", "#8A5200", "yellow")
"""How a finding is shown."""

GOOD = ("healthy", "converging", "no loop")
"""After these a finding begins with "but", after others with "and"."""


def word(verdict: str | None) -> tuple[str, Word]:
    """Get how a verdict is shown.

    Args:
        verdict: Of a summary; None where a model has no loop.

    Returns:
        Its name and look; one that a later version knows looks like `uncertain`.
    """
    name = "no loop" if verdict is None else str(verdict)
    return name, WORDS.get(name, WORDS["uncertain"])


def meaning_of(verdict: str, thresholds: Mapping[str, float | None]) -> str:
    """Say what a verdict means: the conditions on which it is given, with the numbers in force.

    Args:
        verdict: Its name.
        thresholds: Number by name, as `values_in_force` gives them.

    Returns:
        One sentence.
    """
    conditions = [rung.meaning for rung in LADDER if rung.verdict == verdict]
    said = WORDS[verdict].meaning
    text = ": ".join(part for part in ("; or ".join(conditions), said) if part)
    written = {limit.name: limit.written(thresholds[limit.name]) for limit in THRESHOLDS}
    return re.sub(r"`(\w+)`", lambda name: written[name[1]], text)


def values_in_force(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Read the thresholds that a summary's verdicts were given by.

    Args:
        summary: The contents of `summary.json`.

    Returns:
        Number by name; None for one that is not finite, the verdicts' own for one that the summary
        does not tell.
    """
    values: dict[str, float | None] = {threshold.name: threshold.value for threshold in THRESHOLDS}
    return values | {entry["name"]: entry["value"] for entry in summary["thresholds"]}
