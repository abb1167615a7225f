"""Linear probes: what a linear map reads off states it was not fitted on, with scikit-learn.

A probe finds what is there, not what is used, and finds more the wider a state is: its score says
something beside those of control tasks (Hewitt & Liang 1909.03368) only.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Shaped
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Penalties that `RidgeCV` chooses from, by leaving out one training token at a time."""

TOLERANCE, STEPS = 1e-3, 1000
"""Of the largest slope at which a logistic regression ends, and its most steps."""


def class_probe(width: int) -> Any:
    """Make the probe for classes: standardised states, logistic regression.

    Its penalty is C = 1/width (scikit-learn's C): weights on `width` standardised directions are
    a priori so large that logits have unit variance, whatever the width. It is fixed, not tuned:
    scores move by about 0.01 with it, those of the controls too.

    Args:
        width: d_model, or however many numbers a token has.

    Returns:
        An unfitted pipeline.
    """
    fit = LogisticRegression(C=1 / width, tol=TOLERANCE, max_iter=STEPS)
    return make_pipeline(StandardScaler(), fit)


def number_probe(width: int) -> Any:
    """Make the probe for numbers: standardised states, ridge regression.

    Args:
        width: d_model; the penalty is chosen by the training tokens, whatever it is.

    Returns:
        An unfitted pipeline.
    """
    return make_pipeline(StandardScaler(), RidgeCV(ALPHAS))


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Each token as predicted by a probe that has seen no token of its document.

    Attributes:
        hit: Of classes: 1 where the probe's is right, otherwise 0; of numbers: (y − ŷ)².
        baseline: The same of the training tokens' most frequent class, or of their mean.
        cross_entropy: −ln p of the right class, in nats; NaN of numbers, and of a class that no
            training token has.
        baseline_cross_entropy: The same of the classes' shares among the training tokens.
    """

    hit: Float64[np.ndarray, " token"]
    baseline: Float64[np.ndarray, " token"]
    cross_entropy: Float64[np.ndarray, " token"]
    baseline_cross_entropy: Float64[np.ndarray, " token"]


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """Scores of a probe, sample by sample; NaN for a sample without a labelled token.

    Attributes:
        score: Of classes: the share of right ones. Of numbers: R² + ((1 − R²) v_i − e_i)/v, with
            e_i the sample's mean squared error, v_i that of the training tokens' mean, e and v
            their means over samples and R² = 1 − e/v: its mean over samples is R², and it differs
            between samples as R² would (a ratio of means, linearised), so that intervals are as
            of any mean.
        baseline: The same of the training tokens' most frequent class, or of their mean.
        cross_entropy: Mean −ln p of the right class, in nats; NaN of numbers.
        baseline_cross_entropy: The same of the classes' shares among the training tokens.
        tokens: Tokens that were scored.
    """

    score: Float64[np.ndarray, " sample"]
    baseline: Float64[np.ndarray, " sample"]
    cross_entropy: Float64[np.ndarray, " sample"]
    baseline_cross_entropy: Float64[np.ndarray, " sample"]
    tokens: Int[np.ndarray, " sample"]


def group_folds(groups: Sequence[object], folds: int) -> Int[np.ndarray, " sample"]:
    """Share samples between folds so that those of one document stand in one (`GroupKFold`).

    Args:
        groups: The document of each sample, or what else is equal for samples that belong together.
        folds: The most folds; of fewer groups each is one.

    Returns:
        The fold of each sample; all 0 where there is one group.
    """
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    codes = np.array([number[group] for group in groups])
    fold = np.zeros(len(codes), np.int64)
    if (most := min(folds, len(number))) > 1:
        for f, (_, held_out) in enumerate(GroupKFold(most).split(codes, groups=codes)):
            fold[held_out] = f
    return fold


def cross_validated(
    x: Shaped[np.ndarray, "token width"],
    y: Shaped[np.ndarray, " token"],
    fold: Int[np.ndarray, " token"],
    *,
    classes: bool,
) -> TokenScores:
    """Fit a probe to all folds but one and score it on that one, for each.

    Args:
        x: States of tokens, all finite; classes are fitted in their precision.
        y: The class of each as a whole number, or a number.
        fold: The fold of each; of a single fold nothing is scored.
        classes: Whether `y` are classes.

    Returns:
        The scores, in the order of the tokens.
    """
    scores = {name: np.full(len(y), np.nan) for name in TokenScores.__annotations__}
    x = _within_range(x if classes else x.astype(np.float64))
    for f in np.unique(fold):
        test, train = fold == f, fold != f
        if not train.any():
            continue
        parts = x[train], y[train], x[test], y[test]
        single = len(np.unique(parts[1])) == 1
        if classes:
            constant = DummyClassifier(strategy="prior")
            probe = constant if single else class_probe(x.shape[1])
            scored = (_class_scores(probe, *parts), _class_scores(constant, *parts))
        else:
            probe = number_probe(x.shape[1])
            scored = (_squared_errors(probe, *parts), _squared_errors(DummyRegressor(), *parts))
        (hit, loss), (baseline, baseline_loss) = scored
        scores["hit"][test], scores["baseline"][test] = hit, baseline
        scores["cross_entropy"][test] = loss
        scores["baseline_cross_entropy"][test] = baseline_loss
    return TokenScores(**scores)


def _class_scores(
    probe: Any, x: np.ndarray, y: np.ndarray, new_x: np.ndarray, new_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each new token's class is found, and its cross-entropy."""
    probe.fit(x, y)
    p = probe.predict_proba(new_x)
    known = np.isin(new_y, probe.classes_)
    place = np.where(known, np.searchsorted(probe.classes_, new_y), 0)
    loss = -np.log(np.maximum(p[np.arange(len(p)), place], np.finfo(np.float64).tiny))
    hit = probe.classes_[p.argmax(1)] == new_y
    return hit.astype(np.float64), np.where(known, loss, np.nan)


def _squared_errors(
    probe: Any, x: np.ndarray, y: np.ndarray, new_x: np.ndarray, new_y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    errors = np.square(probe.fit(x, y).predict(new_x) - new_y)
    return errors, np.full(len(errors), np.nan)


def _within_range(x: np.ndarray) -> np.ndarray:
    """At a scale at which squares can be summed in float64: a probe does not change with it."""
    largest = float(np.abs(x).max(initial=0.0))
    if 1e-100 < largest < 1e100 or not largest:
        return x
    return np.ldexp(x, -int(np.log2(largest)))


def by_sample(
    scores: TokenScores, sample: Int[np.ndarray, " token"], samples: int, *, classes: bool
) -> SampleScores:
    """Average the scores of tokens over those of each sample.

    Args:
        scores: Of tokens.
        sample: The sample of each.
        samples: Number of samples.
        classes: Whether the labels are classes.

    Returns:
        The scores of the samples.
    """

    def mean(values: np.ndarray) -> np.ndarray:
        sound = np.isfinite(values)
        counts = np.bincount(sample[sound], minlength=samples)
        sums = np.bincount(sample[sound], values[sound], minlength=samples)
        return np.divide(sums, counts, out=np.full(samples, np.nan), where=counts > 0)

    score, baseline = mean(scores.hit), mean(scores.baseline)
    if not classes:
        score, baseline = _shares_of_r2(score, baseline), _shares_of_r2(baseline, baseline)
    return SampleScores(
        score=score, baseline=baseline, cross_entropy=mean(scores.cross_entropy),
        baseline_cross_entropy=mean(scores.baseline_cross_entropy),
        tokens=np.bincount(sample, minlength=samples),
    )  # fmt: skip


def _shares_of_r2(errors: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """What each sample contributes to R², a ratio of two means: its linearisation."""
    sound = np.isfinite(errors)
    level = baseline[sound].mean() if sound.any() else 0.0
    if not level > 0:
        return np.full(len(errors), np.nan)
    r2 = 1 - errors[sound].mean() / level
    return r2 + ((1 - r2) * baseline - errors) / level


def random_labels(
    y: Shaped[np.ndarray, " token"], units: Shaped[np.ndarray, " token"], seed: Sequence[int]
) -> Shaped[np.ndarray, " token"]:
    """Make a control task: each unit has one label, drawn from those of all tokens.

    With token types as units it is that of Hewitt & Liang (1909.03368): it can be learnt by
    remembering which token has which label, and in no other way.

    Args:
        y: The label of each token.
        units: The unit that each belongs to: its type, or its document.
        seed: Of the draw.

    Returns:
        The control's label of each token.
    """
    unit, number = np.unique(units, return_inverse=True)
    return np.random.default_rng(seed).choice(y, len(unit))[number]


def shuffled_labels(
    y: Shaped[np.ndarray, " token"], units: Int[np.ndarray, " token"], seed: Sequence[int]
) -> Shaped[np.ndarray, " token"]:
    """Exchange labels between units at random: nothing is left to be learnt but their shares.

    Args:
        y: The label of each token, the same for those of one unit.
        units: The unit that each belongs to: itself, or its sample.
        seed: Of the exchange.

    Returns:
        The label of each token after it.
    """
    _, first, number = np.unique(units, return_index=True, return_inverse=True)
    return y[np.random.default_rng(seed).permutation(first)][number]


def fit_together(
    jobs: Sequence[Callable[[], TokenScores]], *, threads: int
) -> tuple[list[TokenScores], int]:
    """Run fits on several cores, each of them on one.

    Args:
        jobs: The fits.
        threads: How many to run at a time.

    Returns:
        Their scores in the order of the jobs, the same on any number of cores; and how many
        logistic regressions ended before their slope was small enough.
    """
    # warnings are of the whole process: what its threads raise is caught here, and counted
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("always", ConvergenceWarning)
        with ThreadPoolExecutor(threads) as pool:
            scores = list(pool.map(lambda job: job(), jobs))
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return scores, sum(issubclass(w.category, ConvergenceWarning) for w in caught)


__all__ = [
    "ALPHAS", "STEPS", "TOLERANCE", "SampleScores", "TokenScores", "by_sample", "class_probe",
    "cross_validated", "fit_together", "group_folds", "number_probe",
    "random_labels", "shuffled_labels",
]  # fmt: skip
