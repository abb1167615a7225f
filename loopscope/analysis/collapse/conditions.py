"""Conditions: what can be asked of a loop's signs, answered yes, no or unknown, with words.

A sign is above a threshold where its whole 95 % interval is; where the interval crosses it, the
answer is unknown. Answers are joined by three-valued logic (Kleene).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import gt, lt
from typing import ClassVar, NamedTuple

from loopscope.analysis.collapse.criteria import SIGNS, YARDSTICKS
from loopscope.names import READINGS

Answer = bool | None
Compare = Callable[[float, float], bool]

MIN_SAMPLES = 8
"""Fewer samples give intervals too narrow to judge by."""


MOST_FLAGGED = 0.1
"""A sign that is missing in more of the samples than this decides nothing."""


class Estimate(NamedTuple):
    """A sign's mean over samples with its 95 % interval.

    Attributes:
        mean: The mean.
        low, high: The interval; NaN where there is none.
        n: Samples averaged.
        n_flagged: Samples left out.
        clusters: How many documents, or windows that differ, the interval is over; None for `n`.
    """

    mean: float
    low: float
    high: float
    n: int
    n_flagged: int = 0
    clusters: int | None = None

    @property
    def enough(self) -> int:
        """What is held against `MIN_SAMPLES`."""
        return self.n if self.clusters is None else min(self.n, self.clusters)


class Claim(NamedTuple):
    """An answer and the words for it."""

    answer: Answer
    words: str


class OwnUnit(NamedTuple):
    """A loss of the user's, in a unit that is not known.

    Attributes:
        loss: Its name.
        given: Thresholds that the user gave, which hold in that unit.
    """

    loss: str
    given: frozenset[str] = frozenset()


class Signs:
    """The signs of one checkpoint, to be held against thresholds."""

    def __init__(
        self,
        estimates: Mapping[str, Estimate],
        thresholds: Mapping[str, float],
        own: OwnUnit | None = None,
    ) -> None:
        """Take the signs of one loop.

        Args:
            estimates: Its signs by name.
            thresholds: Number by threshold name.
            own: Where its loss is one of the user's.
        """
        self.estimates, self.thresholds, self.own = estimates, thresholds, own

    def unit_unknown(self, sign: str, threshold: str) -> bool:
        """Tell whether a threshold in nats says nothing of a sign.

        Args:
            sign: The sign.
            threshold: The threshold's name.

        Returns:
            Whether the sign is in the unit of a user's loss and the threshold is not.
        """
        return self.own is not None and sign in IN_NATS and threshold not in self.own.given

    def has(self, sign: str) -> bool:
        """Tell whether a sign was measured.

        Args:
            sign: Its name.

        Returns:
            Whether any sample has a value of it.
        """
        return sign in self.estimates and self.estimates[sign].n > 0

    def claim(
        self,
        sign: str,
        limit: float,
        holds: Compare,
        *,
        unmeasured: Answer = None,
    ) -> Claim:
        """Hold a sign's interval against a number.

        Args:
            sign: Its name.
            limit: The number, in the sign's unit.
            holds: Whether a value is on the side that is asked for.
            unmeasured: The answer where there is no such sign.

        Returns:
            Yes or no where both ends of the interval agree and enough samples have the sign.
        """
        estimate = self.estimates.get(sign)
        if estimate is None or not estimate.n:
            return Claim(unmeasured, f"{TITLES[sign]} could not be measured")
        words = f"{TITLES[sign]}{self._reading(sign)} {interval(estimate)}"
        samples = estimate.n + estimate.n_flagged
        if estimate.enough < MIN_SAMPLES or estimate.n_flagged > MOST_FLAGGED * samples:
            few = f"{estimate.enough} windows that differ" if estimate.enough < estimate.n else ""
            return Claim(
                None, f"{words}, known in {few or f'{estimate.n} of {samples} samples'} only"
            )
        ends = {holds(estimate.low, limit), holds(estimate.high, limit)}
        if math.isnan(estimate.low) or len(ends) > 1:
            return Claim(None, f"{words}, not clearly on one side of {limit:.3g}")
        mean = estimate.mean
        side = "above" if mean > limit else "below" if mean < limit else "at"
        return Claim(ends.pop(), f"{words}, {side} {limit:.3g}")

    def _reading(self, sign: str) -> str:
        """By which reading the gain of the loop is least, in words; empty for other signs."""
        gains = {name: self.estimates.get(f"{name}_gain") for name in READINGS}
        if sign != "loop_gain":
            return ""
        least = self.estimates[sign].mean
        by = [name for name, gain in gains.items() if gain is not None and gain.mean == least]
        return f", {by[0]}," if by else ""


Condition = Callable[[Signs], Claim]
"""What can be asked of one loop's signs."""


@dataclass(frozen=True)
class Above:
    """Whether a sign is above a threshold.

    Attributes:
        sign: The sign.
        threshold: The threshold.
        instead: The sign that is taken where `sign` was not measured.
        unmeasured: The answer where there is neither.
    """

    sign: str
    threshold: str
    instead: str = ""
    unmeasured: Answer = None
    holds: ClassVar[Compare] = staticmethod(gt)

    def __call__(self, signs: Signs) -> Claim:
        sign = self.instead if self.instead and not signs.has(self.sign) else self.sign
        unknown = signs.unit_unknown(sign, self.threshold)
        limit = 0.0 if unknown else signs.thresholds[self.threshold]
        claim = signs.claim(sign, limit, type(self).holds, unmeasured=self.unmeasured)
        if unknown and claim.answer and type(self) is Above and signs.own is not None:
            words = f"{claim.words}, but how much that is in the unit of loss={signs.own.loss} is"
            return Claim(None, f"{words} not known (with_thresholds)")
        return claim


class Below(Above):
    """Whether a sign is below a threshold; its attributes are those of `Above`."""

    holds: ClassVar[Compare] = staticmethod(lt)


@dataclass(frozen=True)
class Lacks:
    """Unknown where a sign was not measured, no where it was."""

    sign: str

    def __call__(self, signs: Signs) -> Claim:
        return Claim(False if signs.has(self.sign) else None, f"{TITLES[self.sign]} is not known")


@dataclass(frozen=True)
class Informed:
    """Whether a model knows enough of the text for small gains to accuse a loop; never no.

    Yes where its loss is below a unigram's by more than a threshold, a part of the unigram's loss,
    and where there is no unigram to hold it against; unknown of a loss of the user's.
    """

    threshold: str

    def __call__(self, signs: Signs) -> Claim:
        if signs.own is not None:
            return Claim(None, f"what loss={signs.own.loss} says of a small gain is not known")
        if not (signs.has("over_unigram") and signs.has("loss")):
            return Claim(True, "what the model knows of the text is not known")
        unigram = signs.estimates["loss"].mean - signs.estimates["over_unigram"].mean
        limit = -signs.thresholds[self.threshold] * unigram
        claim = signs.claim("over_unigram", limit, lt)
        if claim.answer:
            return claim
        return Claim(None, f"{claim.words}: of text that the model hardly knows gains say little")


@dataclass(frozen=True, init=False)
class AllOf:
    """Three-valued "and"; the words are of those that decide."""

    conditions: tuple[Condition, ...]
    decisive: ClassVar[bool] = False

    def __init__(self, *conditions: Condition) -> None:
        object.__setattr__(self, "conditions", conditions)

    def __call__(self, signs: Signs) -> Claim:
        claims = [condition(signs) for condition in self.conditions]
        answers = [claim.answer for claim in claims]
        unknown = None if None in answers else not self.decisive
        answer = self.decisive if self.decisive in answers else unknown
        return Claim(answer, _deciding_words(claims, answer))


class AnyOf(AllOf):
    """Three-valued "or"; the words are of those that decide."""

    decisive: ClassVar[bool] = True


def _deciding_words(claims: Iterable[Claim], answer: Answer) -> str:
    """Words of the claims that give the answer; of an unknown one, all that are not against it."""
    return "; ".join(dict.fromkeys(c.words for c in claims if c.answer is answer))


def interval(estimate: Estimate) -> str:
    """Write a mean with its interval, three significant digits: 0.0421 [0.039, 0.045].

    Args:
        estimate: Of a sign.

    Returns:
        The mean alone where there is no interval.
    """
    if math.isnan(estimate.low):
        return _number(estimate.mean)
    return f"{_number(estimate.mean)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def _number(value: float) -> str:
    """Three significant digits, but no powers of ten for what is nearly nothing."""
    text = f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.4f}"
    return text.replace("-", "−")


IN_NATS = frozenset(sign.name for sign in (*SIGNS, *YARDSTICKS) if sign.per_token)
"""Signs in the unit of the loss."""

TITLES = {sign.name: sign.title for sign in (*SIGNS, *YARDSTICKS)}
