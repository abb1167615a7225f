"""Yardsticks: what the loss of a whole model is held against, and findings beside its verdict.

A verdict is about the loop. A model whose loop works may still predict badly, or live in a few
directions: findings say so, whatever the verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from loopscope.analysis.collapse.conditions import (
    TITLES,
    Above,
    Below,
    Estimate,
    OwnUnit,
    Signs,
)
from loopscope.analysis.collapse.criteria import THRESHOLDS

RULES: tuple[tuple[str, Above], ...] = (
    ("low rank", Below("erank_share", "low_rank", unmeasured=False)),
    ("worse than reference", Above("over_reference", "worse", unmeasured=False)),
    ("worse than unigram", Above("over_unigram", "no_better", unmeasured=False)),
)
"""Each finding and when it is made: where its condition surely holds."""

FINDINGS = tuple(name for name, _ in RULES)
"""What may stand beside a verdict."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is to be said of a model beside the verdict on its loop.

    Attributes:
        name: One of `FINDINGS`.
        because: The sign behind it, with its interval and threshold.
    """

    name: str
    because: str


def findings_of(
    estimates: Mapping[str, Estimate],
    thresholds: Mapping[str, float],
    own: OwnUnit | None = None,
) -> tuple[Finding, ...]:
    """Give the findings on one checkpoint and loop.

    Args:
        estimates: Its signs and yardsticks by name.
        thresholds: Number by threshold name.
        own: Where its loss is one of the user's.

    Returns:
        Those that surely hold.
    """
    signs = Signs(estimates, thresholds, own)
    claims = [(name, condition(signs)) for name, condition in RULES]
    return tuple(Finding(name=name, because=claim.words) for name, claim in claims if claim.answer)


def finding_meanings(thresholds: Mapping[str, float | None]) -> dict[str, str]:
    """Say what each finding means, with the numbers in force.

    Args:
        thresholds: Number by threshold name; None for one that is not finite.

    Returns:
        A sentence by finding.
    """
    by_name = {threshold.name: threshold for threshold in THRESHOLDS}
    sentences = {}
    for name, condition in RULES:
        threshold, value = by_name[condition.threshold], thresholds[condition.threshold]
        side = "below" if isinstance(condition, Below) else "above"
        why = "" if value is None else f": {threshold.meaning_at(value)}"
        limit = threshold.written(value)
        sentences[name] = f"{TITLES[condition.sign]}, {side} {limit}{why}"
    return sentences


def unigram_losses(
    tokens: Any, documents: Sequence[str | None], *, vocabulary: int | None = None
) -> np.ndarray:
    """Give the loss of predicting every token by how frequent it is in the other documents.

    Args:
        tokens: Ids, (sample, pos); the first of each sample is not predicted, as by a model.
        documents: The document of each sample; a sample without one is one itself, and all are
            where there is a single document.
        vocabulary: Number of ids; the largest that occurs, and one, when not given.

    Returns:
        Nats per token, one number per sample: −log((c + 1)/(n + vocabulary)), c and n the counts of
        the token and of all tokens in the other documents. NaN of a single sample.
    """
    ids = np.asarray(tokens)
    size = max(vocabulary or 0, int(ids.max()) + 1)
    names: list[Any] = [i if pd.isna(name) else str(name) for i, name in enumerate(documents)]
    if len({*names}) < 2:  # of one text, by its other windows
        names = list(range(len(ids)))
    losses = np.full(len(ids), np.nan)
    counts = np.bincount(ids.ravel(), minlength=size)
    groups = pd.Series(range(len(ids))).groupby(pd.Series(names, dtype=object), sort=False)
    if len(groups) < 2:
        return losses
    for _, rows in groups:
        inside = ids[rows.to_numpy()]
        others = counts - np.bincount(inside.ravel(), minlength=size)
        logs = np.log(others + 1.0) - np.log(others.sum() + size)
        losses[rows.to_numpy()] = -logs[inside[:, 1:]].mean(axis=1)
    return losses


__all__ = ["FINDINGS", "RULES", "Finding", "finding_meanings", "findings_of", "unigram_losses"]
