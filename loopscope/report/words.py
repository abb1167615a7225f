"""The verdicts as a reader meets them: word, shape, colour and meaning."""

from typing import NamedTuple


class Word(NamedTuple):
    """How one verdict is shown.

    Attributes:
        shape: A character that tells it apart without colour.
        color: Of the word on white; at least 4.5 : 1 against it.
        ansi: Its style in a terminal.
        meaning: What it says of a loop, in one sentence.
    """

    shape: str
    color: str
    ansi: str
    meaning: str


WORDS = {
    "healthy": Word(
        "●", "#00664A", "green",
        "the loop lowers the loss, and none of the conditions below holds",
    ),
    "converging": Word(
        "◆", "#005A8C", "cyan",
        "the last step is less than half as long as the first, and more loops than trained do no "
        "harm: on the way to a fixed point, which is no failure",
    ),
    "skewed": Word(
        "◣", "#8A5200", "yellow",
        "one loop does most of the update, and the others take next to nothing off the loss",
    ),
    "stagnant": Word(
        "■", "#75378F", "magenta",
        "consecutive states are all but the same, and the loop takes next to nothing off the loss",
    ),
    "collapsed": Word(
        "▼", "#B00020", "bold red",
        "the states lose at least half of their rank in the loop, and the loop does harm or the "
        "loops besides the busiest bring next to nothing",
    ),
    "unstable": Word(
        "▲", "#A13B00", "red",
        "states overflow, or an earlier state could be read better than the last",
    ),
    "uncertain": Word(
        "?", "#555555", "bold",
        "these samples do not decide: an interval crosses a threshold, or a measure is missing",
    ),
    "no loop": Word(
        "–", "#555555", "dim",
        "nothing is run again with the same weights, so there is nothing to judge",
    ),
}  # fmt: skip
"""By verdict, the best first; `no loop` stands for a verdict of None."""


def word(verdict: str | None) -> tuple[str, Word]:
    """Get how a verdict is shown.

    Args:
        verdict: Of a summary; None where a model has no loop.

    Returns:
        Its name and look; one that a later version knows looks like `uncertain`.
    """
    name = "no loop" if verdict is None else str(verdict)
    return name, WORDS.get(name, WORDS["uncertain"])
