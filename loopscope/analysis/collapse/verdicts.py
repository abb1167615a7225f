"""Verdicts: which signs make a loop collapsed, skewed, …, and what is said of the evidence.

The most serious verdict whose condition surely holds is given. Where none of the bad ones does,
and some may, the verdict is "uncertain", between those that are left.

`criteria.THRESHOLDS` holds the numbers, `LADDER` the conditions; `verdict_of` asks them of a loop.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd

from loopscope.analysis.collapse.conditions import (
    MIN_SAMPLES,
    TITLES,
    Above,
    AllOf,
    Answer,
    AnyOf,
    Below,
    Claim,
    Condition,
    Estimate,
    Informed,
    Lacks,
    OwnUnit,
    Signs,
    interval,
)
from loopscope.analysis.collapse.criteria import THRESHOLDS
from loopscope.analysis.collapse.sign_values import Key, by_key
from loopscope.analysis.collapse.yardsticks import FINDINGS, Finding, findings_of
from loopscope.errors import unknown_name

VERDICTS = ("healthy", "converging", "skewed", "stagnant", "collapsed", "unstable")
"""What a loop can be, the least serious first; besides, `uncertain`."""

BAD = ("skewed", "stagnant", "collapsed", "unstable")
"""Verdicts that say something is wrong."""


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
        findings: What else is to be said of the model.
    """

    verdict: str | None
    between: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    findings: tuple[Finding, ...] = ()

    def among(self, wanted: Collection[str]) -> str:
        """Tell which of some verdicts and findings this is for sure.

        Args:
            wanted: Names of verdicts and findings.

        Returns:
            In words; empty where none is: "skewed"; "stagnant or skewed" where all that are left
            are wanted.
        """
        if self.verdict in wanted:
            return str(self.verdict)
        if self.between and {*self.between} <= {*wanted}:
            return " or ".join(self.between)
        return ", ".join(finding.name for finding in self.findings if finding.name in wanted)


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
IDLE = Below("rest_gain", "little_gain", instead="loop_gain")
"""The loops besides the busiest bring little; with one iteration, that one does."""

STILL = AnyOf(
    Below("work", "still", unmeasured=False),
    Below("turn", "still", unmeasured=False),
    Above("cka_least", "same", unmeasured=False),
    Below("read_most", "unread", unmeasured=False),
)
"""The core computes nothing, or nothing of it reaches a state."""

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
        "unstable",
        Above("overthinking", "harm", unmeasured=False),
        "an earlier state is read better by more than `harm`, whatever the geometry",
    ),
    Rung(
        "stagnant",
        AnyOf(
            STILL,
            AllOf(Below("loop_gain", "little_gain", unmeasured=False), Informed("informed")),
            AllOf(Above("cka_debiased", "alike"), Lacks("loop_gain")),
        ),
        "the core, or the state, turns by less than `still` over the whole loop, or all states "
        "have a debiased CKA above `same`, or no more than `unread` of what the core writes is "
        "read; or the whole loop takes less than `little_gain` off a loss that is below a "
        "unigram's by more than `informed` (uncertain where gains were not measured and the mean "
        "CKA is above `alike`)",
    ),
    Rung(
        "skewed",
        AnyOf(
            AllOf(Above("turn_skew", "uneven", instead="skew", unmeasured=False), IDLE),
            Below("read_second", "unread", unmeasured=False),
        ),
        "the skew of the turn is above `uneven`, and the loops besides the busiest take less than "
        "`little_gain` off the loss; or no more than `unread` is read of what the loops besides "
        "one write",
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


def verdict_of(
    estimates: Mapping[str, Estimate],
    thresholds: Mapping[str, float],
    own: OwnUnit | None = None,
) -> Verdict:
    """The verdict on one loop.

    Args:
        estimates: Its signs by name.
        thresholds: Number by threshold name.
        own: Where its loss is one of the user's.

    Returns:
        The verdict with its evidence.
    """
    signs = Signs(estimates, thresholds, own)
    claims = [(rung.verdict, rung.condition(signs)) for rung in LADDER]
    checks = tuple(
        Check(verdict=verdict, answer=_ANSWERS[claim.answer], because=claim.words)
        for verdict, claim in claims
    )
    if few := _too_few(estimates):
        return Verdict(verdict="uncertain", evidence=(few,), checks=checks)
    left = _left(claims)
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
    most = max((estimate.enough for estimate in estimates.values()), default=0)
    if most >= MIN_SAMPLES:
        return ""
    kind = "samples" if all(e.n == e.enough for e in estimates.values()) else "windows that differ"
    return f"{most} {kind} are too few to judge; measure {MIN_SAMPLES}"


def _left(claims: Iterable[tuple[str, Claim]]) -> Left:
    """The verdict that surely holds, the most serious first; else those that may."""
    asked = list(claims)
    doubts = [(verdict, claim.words) for verdict, claim in asked if claim.answer is None]
    sure = [(verdict, claim.words) for verdict, claim in asked if claim.answer]
    bad = [(verdict, words) for verdict, words in sure if verdict in BAD]
    if bad:
        return Left((bad[0][0],), (), bad[0][1])
    # what may converge and may not is healthy: neither is a fault
    doubts = [(verdict, doubt) for verdict, doubt in doubts if verdict in BAD]
    good, words = sure[0] if sure else ("healthy", "")
    verdicts = tuple(dict.fromkeys([*(verdict for verdict, _ in doubts), good]))
    return Left(verdicts, tuple(doubt for _, doubt in doubts), words)


def _evidence(left: Left, signs: Signs) -> tuple[str, ...]:
    """The sentences behind a verdict: doubts where several are left, else what decides it."""
    decisive = (left.decisive,) if left.decisive else ()
    if len(left.verdicts) > 1:
        return tuple(dict.fromkeys((*left.doubts, *decisive)))
    return decisive or _healthy_evidence(signs)


def _healthy_evidence(signs: Signs) -> tuple[str, ...]:
    """What speaks for a loop: what it does for the loss, then its geometry."""
    shown = ("loop_gain", "rest_gain", "turn_skew", "cka_debiased", "erank_ratio")
    words = [f"{TITLES[n]} {interval(signs.estimates[n])}" for n in shown if signs.has(n)]
    return ("; ".join(words),) if words else ()


_ANSWERS: dict[Answer, Literal["yes", "no", "unknown"]] = {
    True: "yes", False: "no", None: "unknown",
}  # fmt: skip


def judge(
    signs: pd.DataFrame,
    *,
    thresholds: Mapping[str, float] | None = None,
    loopless: Iterable[str] = (),
    yardsticks: Mapping[Key, Mapping[str, Estimate]] | None = None,
    own_losses: Mapping[str, str] | None = None,
) -> dict[Key, Verdict]:
    """The verdict on every checkpoint and loop.

    Args:
        signs: What `collapse.signs` gives.
        thresholds: Other values for some of `THRESHOLDS`, by name.
        loopless: Models that run nothing twice; they get no verdict.
        yardsticks: Of each checkpoint and loop, by name of the yardstick (`YARDSTICKS`).
        own_losses: Models with a loss of the user's, and its name: thresholds in nats hold for them
            only where they are in `thresholds`.

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
        estimates = estimates_of(rows) | dict((yardsticks or {}).get(key, {}))
        loss = (own_losses or {}).get(key.model)
        own = None if loss is None else OwnUnit(loss, frozenset(thresholds or {}))
        if key.model in plain:
            reason = "it has no loop: no layers are run again with the same weights"
            verdict = Verdict(verdict=None, evidence=(reason,))
        else:
            verdict = verdict_of(estimates, limits, own)
        verdicts[key] = replace(verdict, findings=findings_of(estimates, limits, own))
    return verdicts


def estimates_of(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Read the signs of one checkpoint and loop.

    Args:
        rows: Its rows of `collapse.signs`.

    Returns:
        Estimate by name of the sign.
    """
    numbers = rows[["mean", "low", "high"]].to_numpy(dtype=float).tolist()
    clusters = "clusters" if "clusters" in rows else "n"  # a table of an earlier loopscope
    counts = rows[["n", "n_flagged", clusters]].to_numpy(dtype=int).tolist()
    return {
        str(sign): Estimate(*of_sign, *how_many)
        for sign, of_sign, how_many in zip(rows["sign"], numbers, counts, strict=True)
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
    """Read verdicts and findings from a comma-separated list, as --fail-on takes it.

    Args:
        text: Such as "collapsed,low rank".

    Returns:
        Each verdict once, in the order given.

    Raises:
        UnknownNameError: for a word that is neither.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    allowed = (*VERDICTS, "uncertain", *FINDINGS)
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
