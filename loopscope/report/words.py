"""The verdicts as a reader meets them: word, shape, colour and meaning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from loopscope.analysis.collapse import THRESHOLDS, filled


class Phrase(NamedTuple):
    """What a sentence says of a threshold.

    Attributes:
        threshold: Its name.
        value: The number that `words` fit.
        words: For that number.
        otherwise: For any other one, as `collapse.filled` takes it.
    """

    threshold: str
    value: float
    words: str
    otherwise: str

    def at(self, value: float | None) -> str:
        """Say it of the number in force.

        Args:
            value: The number; None where it is not finite.

        Returns:
            The words, or the sentence with the number.
        """
        return self.words if value == self.value else filled(self.otherwise, value)


class Word(NamedTuple):
    """How one verdict is shown.

    Attributes:
        shape: A character that tells it apart without colour.
        color: Of the word on white; at least 4.5 : 1 against it.
        ansi: Its style in a terminal.
        meaning: What it says of a loop: the parts of one sentence, see `meaning_of`.
    """

    shape: str
    color: str
    ansi: str
    meaning: tuple[str | Phrase, ...]


_HARM = Phrase(
    "harm", 0.1, "", " (an earlier state is read better by more than {value} nats/token)"
)
_LITTLE = Phrase("little_gain", 0.02, "next to nothing off", "less than {percent} off")

WORDS = {
    "healthy": Word(
        "●", "#00664A", "green",
        ("the loop lowers the loss, and none of the conditions below holds",),
    ),
    "converging": Word(
        "◆", "#005A8C", "cyan",
        (
            "the last step is less than ",
            Phrase("shrinking", 0.5, "half", "{percent}"),
            " as long as the first, and more loops than trained ",
            Phrase("stable", 0.05, "do no harm", "cost at most {value} nats/token"),
            ": on the way to a fixed point, which is no failure",
        ),
    ),
    "skewed": Word(
        "◣", "#8A5200", "yellow",
        (
            "one loop does ",
            Phrase(
                "uneven", 0.5, "most of the update",
                "more of the update than {percent} of the way from an even split to everything",
            ),
            ", and the others take ", _LITTLE, " the loss",
        ),
    ),
    "stagnant": Word(
        "■", "#75378F", "magenta",
        (
            "consecutive states ",
            Phrase("alike", 0.98, "are all but the same", "have a CKA above {value}"),
            ", and the loop takes ", _LITTLE, " the loss",
        ),
    ),
    "collapsed": Word(
        "▼", "#B00020", "bold red",
        (
            "the states ",
            Phrase(
                "half_rank", 0.5, "lose at least half of their rank",
                "keep less than {percent} of their rank",
            ),
            " in the loop",
            Phrase("rank_one", 2.0, "", " or have fewer than {value} directions left"),
            ", and the loop does harm", _HARM, " or the loops besides the busiest bring ",
            Phrase("little_gain", 0.02, "next to nothing", "less than {percent} of the loss"),
        ),
    ),
    "unstable": Word(
        "▲", "#A13B00", "red",
        (
            "states overflow, or an earlier state could be read better than the last",
            Phrase("harm", 0.1, "", " by more than {value} nats/token"),
        ),
    ),
    "uncertain": Word(
        "?", "#555555", "bold",
        ("these samples do not decide: an interval crosses a threshold, or a measure is missing",),
    ),
    "no loop": Word(
        "–", "#555555", "dim",
        ("nothing is run again with the same weights, so there is nothing to judge",),
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


def meaning_of(look: Word, thresholds: Mapping[str, float | None]) -> str:
    """Say what a verdict means, with the thresholds that it was given by.

    Args:
        look: Of the verdict.
        thresholds: Number by name, as `values_in_force` gives them.

    Returns:
        One sentence.
    """
    parts = (
        part.at(thresholds[part.threshold]) if isinstance(part, Phrase) else part
        for part in look.meaning
    )
    return "".join(parts)


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
