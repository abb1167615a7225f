"""Verdicts: which signs make a loop collapsed, skewed, …, and what is said of the evidence.

A sign is above a threshold where its whole 95 % interval is; where the interval crosses it, the
answer is unknown. Answers are joined by three-valued logic (Kleene): a verdict is given where its
condition surely holds and that of every more serious one surely does not; otherwise the verdict is
"uncertain", between those that are left.

`criteria.THRESHOLDS` holds the numbers, `LADDER` the conditions; `verdict_of` asks them of a loop.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import gt, lt
from typing import Any, Literal, NamedTuple

import pandas as pd

from loopscope.analysis.collapse.criteria import SIGNS, THRESHOLDS
from loopscope.analysis.collapse.sign_values import Key, by_key
from loopscope.errors import unknown_name

Answer = bool | None

VERDICTS = ("healthy", "converging", "skewed", "stagnant", "collapsed", "unstable")
"""What a loop can be, the least serious first; besides, `uncertain`."""

MIN_SAMPLES = 8
"""Fewer samples give intervals too narrow to judge by."""


MOST_FLAGGED = 0.1
"""A sign that is missing in more of the samples than this decides nothing."""


class Estimate(NamedTuple):
    """A sign's mean over samples with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    n_flagged: int = 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether one verdict's condition holds.

    Attributes:
        verdict: The verdict.
        answer: Yes, no, or unknown.
        because: The signs behind the answer, with intervals and thresholds.
    """

    verdict: str
    answer: Literal["yes", "no", "unknown"]
    because: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a loop is, and why.

    Attributes:
        verdict: One of `VERDICTS`, `uncertain`, or None where there is nothing to judge.
        between: The verdicts that are left where it is uncertain.
        evidence: Sentences, the decisive first.
        checks: Every condition in the order in which they were asked, the most serious first.
    """

    verdict: str | None
    between: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()


class Claim(NamedTuple):
    """An answer and the words for it."""

    answer: Answer
    words: str


class Signs:
    """The signs of one checkpoint, to be held against thresholds."""

    def __init__(self, estimates: Mapping[str, Estimate], thresholds: Mapping[str, float]) -> None:
        """Take the signs of one loop.

        Args:
            estimates: Its signs by name.
            thresholds: Number by threshold name.
        """
        self.estimates, self.thresholds = estimates, thresholds

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
        holds: Callable[[float, float], bool],
        *,
        unmeasured: Answer = None,
        remark: str = "",
    ) -> Claim:
        """Hold a sign's interval against a number.

        Args:
            sign: Its name.
            limit: The number, in the sign's unit.
            holds: Whether a value is on the side that is asked for.
            unmeasured: The answer where there is no such sign.
            remark: Follows the number in the words.

        Returns:
            Yes or no where both ends of the interval agree and enough samples have the sign.
        """
        estimate = self.estimates.get(sign)
        if estimate is None or not estimate.n:
            return Claim(unmeasured, f"{TITLES[sign]} could not be measured")
        words = f"{TITLES[sign]} {interval(estimate)}"
        samples = estimate.n + estimate.n_flagged
        if estimate.n < MIN_SAMPLES or estimate.n_flagged > MOST_FLAGGED * samples:
            return Claim(None, f"{words}, known in {estimate.n} of {samples} samples only")
        ends = {holds(estimate.low, limit), holds(estimate.high, limit)}
        if math.isnan(estimate.low) or len(ends) > 1:
            return Claim(None, f"{words}, not clearly on one side of {limit:.3g}{remark}")
        mean = estimate.mean
        side = "above" if mean > limit else "below" if mean < limit else "at"
        return Claim(ends.pop(), f"{words}, {side} {limit:.3g}{remark}")


Condition = Callable[[Signs], Claim]
"""What can be asked of one loop's signs."""


@dataclass(frozen=True)
class Above:
    """Whether a sign is above a threshold; `unmeasured` where there is no such sign."""

    sign: str
    threshold: str
    unmeasured: Answer = None

    def __call__(self, signs: Signs) -> Claim:
        limit = signs.thresholds[self.threshold]
        return signs.claim(self.sign, limit, gt, unmeasured=self.unmeasured)


@dataclass(frozen=True)
class Below:
    """Whether a sign is below a threshold; `unmeasured` where there is no such sign."""

    sign: str
    threshold: str
    unmeasured: Answer = None

    def __call__(self, signs: Signs) -> Claim:
        limit = signs.thresholds[self.threshold]
        return signs.claim(self.sign, limit, lt, unmeasured=self.unmeasured)


@dataclass(frozen=True)
class Little:
    """Whether a gain is but a small part of the loss; of `instead` where `gain` has no value."""

    gain: str
    instead: str = ""
    threshold: str = "little_gain"

    def __call__(self, signs: Signs) -> Claim:
        gain = self.instead if self.instead and not signs.has(self.gain) else self.gain
        if not signs.has("loss"):
            return Claim(None, f"{TITLES[gain]}: the loss was not measured")
        part = signs.thresholds[self.threshold]
        limit = part * signs.estimates["loss"].mean
        return signs.claim(gain, limit, lt, remark=f" ({100 * part:.3g}% of the loss)")


@dataclass(frozen=True, init=False)
class AllOf:
    """Three-valued "and"; the words are of those that decide."""

    conditions: tuple[Condition, ...]

    def __init__(self, *conditions: Condition) -> None:
        object.__setattr__(self, "conditions", conditions)

    def __call__(self, signs: Signs) -> Claim:
        claims = [condition(signs) for condition in self.conditions]
        answers = [claim.answer for claim in claims]
        answer = False if False in answers else None if None in answers else True
        return Claim(answer, _deciding_words(claims, answer))


@dataclass(frozen=True, init=False)
class AnyOf:
    """Three-valued "or"; the words are of those that decide."""

    conditions: tuple[Condition, ...]

    def __init__(self, *conditions: Condition) -> None:
        object.__setattr__(self, "conditions", conditions)

    def __call__(self, signs: Signs) -> Claim:
        claims = [condition(signs) for condition in self.conditions]
        answers = [claim.answer for claim in claims]
        answer = True if True in answers else None if None in answers else False
        return Claim(answer, _deciding_words(claims, answer))


def _deciding_words(claims: Iterable[Claim], answer: Answer) -> str:
    """Words of the claims that give the answer; of an unknown one, all that are not against it."""
    return "; ".join(dict.fromkeys(c.words for c in claims if c.answer is answer))


def overflows(signs: Signs) -> Claim:
    """Ask whether any sample has values that are not finite.

    Args:
        signs: Of one loop.

    Returns:
        Yes with the share of the samples, or no.
    """
    share = signs.estimates["nonfinite"].mean if signs.has("nonfinite") else 0.0
    if share > 0:
        return Claim(True, f"{share:.3g} of the samples have NaN or infinite values")
    return Claim(False, "all values are finite")


def lasts(signs: Signs) -> Claim:
    """Ask whether more loops than trained give finite losses.

    Args:
        signs: Of one loop.

    Returns:
        Yes, or no with the number of samples in which they do not.
    """
    estimate = signs.estimates.get("more_loss")
    lost = 0 if estimate is None else estimate.n_flagged
    if lost:
        return Claim(False, f"more loops give NaN or infinite losses in {lost} samples")
    return Claim(True, "more loops give finite losses")


class Rung(NamedTuple):
    """One verdict and when it is given.

    Attributes:
        verdict: One of `VERDICTS`.
        condition: What has to hold.
        meaning: The condition in words, with the names of its thresholds.
    """

    verdict: str
    condition: Condition
    meaning: str


HARM = Above("overthinking", "harm")
USELESS = Little("loop_gain")
"""The whole loop brings little."""

IDLE = Little("rest_gain", instead="loop_gain")
"""The loops besides the busiest bring little; with one iteration, that one does."""

LADDER = (
    Rung("unstable", overflows, "values are NaN or infinite, up to h(K) or in the loss"),
    Rung(
        "unstable",
        AllOf(Above("step_ratio", "growing", unmeasured=False), HARM),
        "the last step is more than `growing` of the first, and an earlier state is read better by "
        "more than `harm`",
    ),
    Rung(
        "collapsed",
        AllOf(
            AnyOf(Below("erank_K", "rank_one"), Below("erank_ratio", "half_rank")),
            AnyOf(HARM, IDLE),
        ),
        "h(K) has fewer than `rank_one` directions, or less than `half_rank` of the effective rank "
        "of h(0); and an earlier state is read better by more than `harm`, or the loops besides "
        "the busiest take less than `little_gain` off the loss",
    ),
    Rung(
        "stagnant",
        AllOf(Above("cka_debiased", "alike"), USELESS),
        "consecutive states have a debiased CKA above `alike`, and the whole loop takes less than "
        "`little_gain` off the loss",
    ),
    Rung(
        "skewed",
        AllOf(Above("skew", "uneven", unmeasured=False), IDLE),
        "the skew is above `uneven`, and the loops besides the busiest take less than "
        "`little_gain` off the loss",
    ),
    Rung(
        "unstable",
        Above("overthinking", "harm", unmeasured=False),
        "an earlier state is read better by more than `harm`, whatever the geometry",
    ),
    Rung(
        "converging",
        AllOf(
            Below("step_ratio", "shrinking", unmeasured=False),
            Below("more_loss", "stable", unmeasured=False),
            lasts,
        ),
        "the last step, of the T loops run, is less than `shrinking` of the first, and more loops "
        "than trained cost less than `stable`",
    ),
)
"""The conditions in the order in which they are asked, the most serious first; else `healthy`."""


def verdict_of(estimates: Mapping[str, Estimate], thresholds: Mapping[str, float]) -> Verdict:
    """The verdict on one loop.

    Args:
        estimates: Its signs by name.
        thresholds: Number by threshold name.

    Returns:
        The verdict with its evidence.
    """
    signs = Signs(estimates, thresholds)
    claims = [(rung.verdict, rung.condition(signs)) for rung in LADDER]
    checks = tuple(
        Check(verdict=verdict, answer=_ANSWERS[claim.answer], because=claim.words)
        for verdict, claim in claims
    )
    if few := _too_few(estimates):
        return Verdict(verdict="uncertain", evidence=(few,), checks=checks)
    left = _left(claims)
    if left.verdicts == ("healthy",) and (useless := USELESS(signs)).answer:
        doubt = f"{useless.words}, though the states change"
        left = Left(("stagnant", "healthy"), (doubt,), "")
    evidence = _evidence(left, signs)
    if len(left.verdicts) > 1:
        return Verdict(verdict="uncertain", between=left.verdicts, evidence=evidence, checks=checks)
    return Verdict(verdict=left.verdicts[0], evidence=evidence, checks=checks)


class Left(NamedTuple):
    """What a loop may be once every condition was asked.

    Attributes:
        verdicts: Those that are left, the most serious first.
        doubts: Words of the conditions that may hold.
        decisive: Words of the first that surely holds; empty without one.
    """

    verdicts: tuple[str, ...]
    doubts: tuple[str, ...]
    decisive: str


def _too_few(estimates: Mapping[str, Estimate]) -> str:
    """Why there are too few samples to judge; empty where there are enough."""
    most = max((estimate.n for estimate in estimates.values()), default=0)
    if most >= MIN_SAMPLES:
        return ""
    return f"{most} samples are too few to judge; measure {MIN_SAMPLES}"


def _left(claims: Iterable[tuple[str, Claim]]) -> Left:
    """The verdicts that may hold, down to the first that surely does."""
    verdicts: dict[str, None] = {}
    doubts: list[str] = []
    for verdict, claim in claims:
        if claim.answer is False:
            continue
        verdicts[verdict] = None
        if claim.answer:
            return Left(tuple(verdicts), tuple(doubts), claim.words)
        doubts.append(claim.words)
    return Left((*verdicts, "healthy"), tuple(doubts), "")


def _evidence(left: Left, signs: Signs) -> tuple[str, ...]:
    """The sentences behind a verdict: doubts where several are left, else what decides it."""
    decisive = (left.decisive,) if left.decisive else ()
    if len(left.verdicts) > 1:
        return tuple(dict.fromkeys((*left.doubts, *decisive)))
    return decisive or _healthy_evidence(signs)


def _healthy_evidence(signs: Signs) -> tuple[str, ...]:
    """What speaks for a loop: what it does for the loss, then its geometry."""
    shown = ("loop_gain", "rest_gain", "skew", "cka_debiased", "erank_ratio")
    words = [f"{TITLES[n]} {interval(signs.estimates[n])}" for n in shown if signs.has(n)]
    return ("; ".join(words),) if words else ()


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


TITLES = {sign.name: sign.title for sign in SIGNS}
_ANSWERS: dict[Answer, Literal["yes", "no", "unknown"]] = {
    True: "yes", False: "no", None: "unknown",
}  # fmt: skip


BAD = ("skewed", "stagnant", "collapsed", "unstable")
"""Verdicts that say something is wrong."""


def judge(
    signs: pd.DataFrame,
    *,
    thresholds: Mapping[str, float] | None = None,
    loopless: Iterable[str] = (),
) -> dict[Key, Verdict]:
    """The verdict on every checkpoint and loop.

    Args:
        signs: What `collapse.signs` gives.
        thresholds: Other values for some of `THRESHOLDS`, by name.
        loopless: Models that run nothing twice; they get no verdict.

    Returns:
        Verdict by (model, step, loop).

    Raises:
        UnknownNameError: for a threshold that does not exist.
    """
    limits = {threshold.name: threshold.value for threshold in THRESHOLDS}
    for name in thresholds or {}:
        if name not in limits:
            raise unknown_name("threshold", name, limits)
    limits |= dict(thresholds or {})
    plain = set(loopless)
    verdicts: dict[Key, Verdict] = {}
    for key, rows in by_key(signs).items():
        if key.model in plain:
            reason = "it has no loop: no layers are run again with the same weights"
            verdicts[key] = Verdict(verdict=None, evidence=(reason,))
        else:
            verdicts[key] = verdict_of(estimates_of(rows), limits)
    return verdicts


def estimates_of(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Read the signs of one checkpoint and loop.

    Args:
        rows: Its rows of `collapse.signs`.

    Returns:
        Estimate by name of the sign.
    """
    columns = rows[["mean", "low", "high", "n", "n_flagged"]].to_numpy(dtype=float).tolist()
    return {
        str(sign): Estimate(mean, low, high, int(n), int(flagged))
        for sign, (mean, low, high, n, flagged) in zip(rows["sign"], columns, strict=True)
    }


class Onset(NamedTuple):
    """Since when a run is what it is at its end.

    Attributes:
        verdict: The verdict at the end.
        step: The first checkpoint of the last stretch with that verdict.
        after: The last checkpoint before it that was judged otherwise; None without one.
    """

    verdict: str
    step: int
    after: int | None


def onset(verdicts: Mapping[int, Verdict]) -> Onset | None:
    """Where a bad verdict sets in that holds to the end of a run.

    Args:
        verdicts: Verdict by step.

    Returns:
        None where the last checkpoint is not bad, or uncertain. Uncertain checkpoints within the
        stretch do not end it, but it never begins with one.
    """
    steps = sorted(verdicts)
    if not steps or (last := verdicts[steps[-1]].verdict) not in BAD:
        return None
    began, after = steps[-1], None
    for step in reversed(steps):
        verdict = verdicts[step].verdict
        if verdict == last:
            began = step
        elif verdict != "uncertain":
            after = step
            break
    return Onset(str(last), began, after)


def parse_verdicts(text: str) -> tuple[str, ...]:
    """Read verdicts from a comma-separated list, as --fail-on takes it.

    Args:
        text: Such as "collapsed,unstable".

    Returns:
        Each verdict once, in the order given.

    Raises:
        UnknownNameError: for a word that is no verdict.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    allowed = (*VERDICTS, "uncertain")
    for name in names:
        if name not in allowed:
            raise unknown_name("verdict", name, allowed)
    if not names:
        raise unknown_name("verdict", text, allowed)
    return names


def label(key: Key, loops: int = 1) -> str:
    """Call a checkpoint in text by its model, step and, where it has several, loop.

    Args:
        key: Of the checkpoint and loop.
        loops: How many loops the model has.

    Returns:
        Such as "base, step 500, H".
    """
    model, step, loop = key
    words: list[Any] = [model]
    if step is not None:
        words.append(f"step {step}")
    if loops > 1:
        words.append(loop)
    return ", ".join(map(str, words))
