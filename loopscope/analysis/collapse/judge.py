"""Judging: the signs of every checkpoint → its verdict; and since when, in a series."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from loopscope.analysis.collapse.samples import Key, by_key
from loopscope.analysis.collapse.verdict import (
    THRESHOLDS,
    VERDICTS,
    Estimate,
    Verdict,
    verdict_of,
)
from loopscope.errors import unknown_name

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
