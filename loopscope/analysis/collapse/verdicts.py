"""Verdicts: which signs make a loop collapsed, skewed, …, and what is said of the evidence.

A sign is above a threshold where its whole 95 % interval is; where the interval crosses it, the
answer is unknown. Answers are joined by three-valued logic (Kleene): a verdict is given where its
condition surely holds and that of every more serious one surely does not; otherwise the verdict is
"uncertain", between those that are left.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import gt, lt
from typing import Any, Literal, NamedTuple

import pandas as pd

from loopscope.analysis.collapse.sign_values import Key, by_key
from loopscope.analysis.collapse.signs import SIGNS
from loopscope.errors import unknown_name

Answer = bool | None

VERDICTS = ("healthy", "converging", "skewed", "stagnant", "collapsed", "unstable")
"""What a loop can be, the least serious first; besides, `uncertain`."""

MIN_SAMPLES = 8
"""Fewer samples give intervals too narrow to judge by."""


MOST_FLAGGED = 0.1
"""A sign that is missing in more of the samples than this decides nothing."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A number that a sign is held against.

    Attributes:
        name: Under which `judge` takes another value.
        signs: What is held against it.
        value: The number.
        unit: Empty for a pure number.
        meaning: What it means to be on the other side.
    """

    name: str
    signs: tuple[str, ...]
    value: float
    unit: str = ""
    meaning: str


THRESHOLDS = (
    Threshold(
        name="little_gain",
        signs=("loop_gain", "rest_gain"),
        value=0.02,
        unit="of the loss",
        meaning="loops that take off less do little",
    ),
    Threshold(
        name="harm",
        signs=("overthinking",),
        value=0.1,
        unit="nats/token",
        meaning="an earlier state read better by more: the loop does harm",
    ),
    Threshold(
        name="uneven",
        signs=("skew",),
        value=0.5,
        meaning="half way from an even split to one loop doing everything",
    ),
    Threshold(
        name="alike",
        signs=("cka_debiased",),
        value=0.98,
        meaning="consecutive states are all but the same, up to rotation and scale",
    ),
    Threshold(
        name="half_rank",
        signs=("erank_ratio",),
        value=0.5,
        meaning="the loop loses half of the effective rank that it is given",
    ),
    Threshold(
        name="rank_one",
        signs=("erank_K",),
        value=2.0,
        meaning="fewer than two directions are left",
    ),
    Threshold(
        name="growing",
        signs=("step_ratio",),
        value=1.0,
        meaning="the last step is longer than the first",
    ),
    Threshold(
        name="shrinking",
        signs=("step_ratio",),
        value=0.5,
        meaning="the last step is less than half as long as the first",
    ),
    Threshold(
        name="stable",
        signs=("more_loss",),
        value=0.05,
        unit="nats/token",
        meaning="more loops than trained cost no more than this",
    ),
)


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


def all_of(*claims: Claim) -> Claim:
    """Three-valued "and"; the words are of those that decide."""
    answers = [claim.answer for claim in claims]
    answer = False if False in answers else None if None in answers else True
    return Claim(answer, _said(claims, answer))


def any_of(*claims: Claim) -> Claim:
    """Three-valued "or"; the words are of those that decide."""
    answers = [claim.answer for claim in claims]
    answer = True if True in answers else None if None in answers else False
    return Claim(answer, _said(claims, answer))


def _said(claims: Iterable[Claim], answer: Answer) -> str:
    """Words of the claims that give the answer; of an unknown one, all that are not against it."""
    return "; ".join(dict.fromkeys(c.words for c in claims if c.answer is answer))


class Signs:
    """The signs of one checkpoint, to be held against thresholds."""

    def __init__(self, estimates: Mapping[str, Estimate], thresholds: Mapping[str, float]) -> None:
        self.estimates, self.thresholds = estimates, thresholds

    def above(self, sign: str, threshold: str, *, unmeasured: Answer = None) -> Claim:
        """Whether a sign's mean is above a threshold; `unmeasured` where there is no such sign."""
        return self._claim(sign, self.thresholds[threshold], unmeasured, gt)

    def below(self, sign: str, threshold: str, *, unmeasured: Answer = None) -> Claim:
        """Whether a sign's mean is below a threshold; `unmeasured` where there is no such sign."""
        return self._claim(sign, self.thresholds[threshold], unmeasured, lt)

    def little(self, gain: str) -> Claim:
        """Whether a gain is but a small part of the loss."""
        if not self.has("loss"):
            return Claim(None, f"{TITLES[gain]}: the loss was not measured")
        part = self.thresholds["little_gain"]
        limit = part * self.estimates["loss"].mean
        said = f" ({part:.0%} of the loss)"
        return self._claim(gain, limit, None, lt, said)

    def _claim(
        self,
        sign: str,
        limit: float,
        unmeasured: Answer,
        holds: Callable[[float, float], bool],
        said: str = "",
    ) -> Claim:
        found = self.estimates.get(sign)
        if found is None or not found.n:
            return Claim(unmeasured, f"{TITLES[sign]} could not be measured")
        told = f"{TITLES[sign]} {interval(found)}"
        if found.n < MIN_SAMPLES or found.n_flagged > MOST_FLAGGED * (found.n + found.n_flagged):
            few = f"known in {found.n} of {found.n + found.n_flagged} samples only"
            return Claim(None, f"{told}, {few}")
        ends = {holds(found.low, limit), holds(found.high, limit)}
        if math.isnan(found.low) or len(ends) > 1:
            return Claim(None, f"{told}, not clearly on one side of {limit:.3g}{said}")
        side = "above" if found.mean > limit else "below" if found.mean < limit else "at"
        return Claim(ends.pop(), f"{told}, {side} {limit:.3g}{said}")

    def has(self, sign: str) -> bool:
        """Whether a sign was measured."""
        return sign in self.estimates and self.estimates[sign].n > 0


def verdict_of(estimates: Mapping[str, Estimate], thresholds: Mapping[str, float]) -> Verdict:
    """The verdict on one loop.

    Args:
        estimates: Its signs by name.
        thresholds: Number by threshold name.

    Returns:
        The verdict with its evidence.
    """
    given = Signs(estimates, thresholds)
    harm = given.above("overthinking", "harm")
    harmful = given.above("overthinking", "harm", unmeasured=False)
    # with one iteration there are no others: what the loop does is what it does
    others = "rest_gain" if given.has("rest_gain") else "loop_gain"
    idle, unused = given.little(others), given.little("loop_gain")
    ladder = [
        ("unstable", _not_finite(estimates)),
        ("unstable", all_of(given.above("step_ratio", "growing", unmeasured=False), harm)),
        (
            "collapsed",
            all_of(
                any_of(given.below("erank_K", "rank_one"), given.below("erank_ratio", "half_rank")),
                any_of(harm, idle),
            ),
        ),
        (
            "stagnant",
            all_of(given.above("cka_debiased", "alike"), unused),
        ),
        ("skewed", all_of(given.above("skew", "uneven", unmeasured=False), idle)),
        ("unstable", harmful),
        (
            "converging",
            all_of(
                given.below("step_ratio", "shrinking", unmeasured=False),
                given.below("more_loss", "stable", unmeasured=False),
                _lasting(estimates),
            ),
        ),
    ]
    checks = tuple(
        Check(verdict=name, answer=_ANSWERS[claim.answer], because=claim.words)
        for name, claim in ladder
    )
    counts = [e.n for e in estimates.values() if e.n]
    if not counts or max(counts) < MIN_SAMPLES:
        few = f"{max(counts, default=0)} samples are too few to judge; measure {MIN_SAMPLES}"
        return Verdict(verdict="uncertain", evidence=(few,), checks=checks)
    left: list[str] = []
    doubts: list[str] = []
    sure = ""
    for name, claim in ladder:
        if claim.answer is False:
            continue
        if name not in left:
            left.append(name)
        if claim.answer:
            sure = claim.words
            break
        doubts.append(claim.words)
    else:
        left.append("healthy")
    if left == ["healthy"] and unused.answer:
        left = ["stagnant", "healthy"]
        doubts = [f"{unused.words}, though the states change"]
    if len(left) > 1:
        told = tuple(dict.fromkeys(doubts + ([sure] if sure else [])))
        return Verdict(verdict="uncertain", between=tuple(left), evidence=told, checks=checks)
    told = (sure,) if sure else tuple(healthy_words(estimates))
    return Verdict(verdict=left[0], evidence=told, checks=checks)


def healthy_words(estimates: Mapping[str, Estimate]) -> list[str]:
    """What speaks for a loop: what it does for the loss, then its geometry."""
    shown = ("loop_gain", "rest_gain", "skew", "cka_debiased", "erank_ratio")
    told = [f"{TITLES[n]} {interval(estimates[n])}" for n in shown if _there(estimates, n)]
    return ["; ".join(told)] if told else []


def interval(found: Estimate) -> str:
    """A mean with its interval, three significant digits: 0.0421 [0.039, 0.045]."""
    if math.isnan(found.low):
        return _number(found.mean)
    return f"{_number(found.mean)} [{_number(found.low)}, {_number(found.high)}]"


def _number(value: float) -> str:
    """Three significant digits, but no powers of ten for what is nearly nothing."""
    text = f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.4f}"
    return text.replace("-", "−")


TITLES = {sign.name: sign.title for sign in SIGNS}
_ANSWERS: dict[Answer, Literal["yes", "no", "unknown"]] = {
    True: "yes", False: "no", None: "unknown",
}  # fmt: skip


def _there(estimates: Mapping[str, Estimate], name: str) -> bool:
    return name in estimates and estimates[name].n > 0


def _lasting(estimates: Mapping[str, Estimate]) -> Claim:
    """Whether more loops than trained give finite losses."""
    found = estimates.get("more_loss")
    lost = 0 if found is None else found.n_flagged
    if lost:
        return Claim(False, f"more loops give NaN or infinite losses in {lost} samples")
    return Claim(True, "more loops give finite losses")


def _not_finite(estimates: Mapping[str, Estimate]) -> Claim:
    share = estimates["nonfinite"].mean if _there(estimates, "nonfinite") else 0.0
    if share > 0:
        return Claim(True, f"{share:.3g} of the samples have NaN or infinite values")
    return Claim(False, "all values are finite")


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
    limits = {one.name: one.value for one in THRESHOLDS}
    for name in thresholds or {}:
        if name not in limits:
            raise unknown_name("threshold", name, limits)
    limits |= dict(thresholds or {})
    plain = set(loopless)
    found: dict[Key, Verdict] = {}
    for key, rows in by_key(signs).items():
        if key.model in plain:
            reason = "it has no loop: no layers are run again with the same weights"
            found[key] = Verdict(verdict=None, evidence=(reason,))
        else:
            found[key] = verdict_of(estimates(rows), limits)
    return found


def estimates(rows: pd.DataFrame) -> dict[str, Estimate]:
    """The signs of one checkpoint by name, from its rows of `collapse.signs`."""
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
    """Verdicts from a comma-separated list, as --fail-on takes it.

    Raises:
        UnknownNameError: for a word that is no verdict.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = (*VERDICTS, "uncertain")
    for name in names:
        if name not in known:
            raise unknown_name("verdict", name, known)
    if not names:
        raise unknown_name("verdict", text, known)
    return names


def label(key: Key, loops: int = 1) -> str:
    """How a checkpoint is called in text: model, step and, where it has several, loop."""
    model, step, loop = key
    words: list[Any] = [model]
    if step is not None:
        words.append(f"step {step}")
    if loops > 1:
        words.append(loop)
    return ", ".join(map(str, words))
