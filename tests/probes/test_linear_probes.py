"""Linear probes against scikit-learn called by hand; folds, controls, nothing planted."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from loopscope.probes import linear_probes
from loopscope.probes.linear_probes import (
    ALPHAS,
    STEPS,
    TOLERANCE,
    by_sample,
    cross_validated,
    fit_together,
    group_folds,
    random_labels,
    shuffled_labels,
)

SAMPLES, TOKENS, WIDTH = 24, 12, 6


def planted(seed=0, strength=1.5, width=WIDTH):
    """States of unequal scales with three unequally frequent classes in them, and their samples."""
    random = np.random.default_rng(seed)
    n = SAMPLES * TOKENS
    y = random.choice(3, n, p=[0.5, 0.3, 0.2])
    x = random.normal(size=(n, width)) * np.arange(1, width + 1) + 5
    x[:, 0] += strength * (y == 1)
    x[:, 1] -= 2 * strength * (y == 2)
    return x, y, np.repeat(np.arange(SAMPLES), TOKENS)


DOCUMENTS = ["a", "b", "c", "a", "d", "e", "f", "g"] * 3


def scored(x, y, sample, *, classes=True, documents=DOCUMENTS, folds=4):
    fold = group_folds(documents, folds)
    tokens = cross_validated(x, y, fold[sample], classes=classes)
    return by_sample(tokens, sample, SAMPLES, classes=classes)


def test_scikit_learn_by_hand_gives_the_same_scores():
    x, y, sample = planted()
    groups = np.array(DOCUMENTS)[sample]
    pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / WIDTH, tol=TOLERANCE, max_iter=STEPS)
    )
    p = cross_val_predict(pipeline, x, y, groups=groups, cv=GroupKFold(4), method="predict_proba")
    scores = scored(x, y, sample)
    np.testing.assert_allclose(scores.score.mean(), (p.argmax(1) == y).mean(), rtol=1e-12)
    np.testing.assert_allclose(scores.cross_entropy.mean(), log_loss(y, p), rtol=1e-9)
    assert scores.score.mean() > scores.baseline.mean() + 0.05
    assert scores.cross_entropy.mean() < scores.baseline_cross_entropy.mean() - 0.05


def test_of_numbers_the_mean_over_samples_is_r2():
    x, _, sample = planted(seed=1)
    y = 0.3 * x[:, 0] - 0.1 * x[:, 3] + np.random.default_rng(2).normal(size=len(x)) + 4
    groups = np.array(DOCUMENTS)[sample]
    pipeline = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
    predicted = cross_val_predict(pipeline, x, y, groups=groups, cv=GroupKFold(4))
    scores = scored(x, y, sample, classes=False)
    means = np.zeros_like(y)
    for train, test in GroupKFold(4).split(x, groups=groups):
        means[test] = y[train].mean()
    expected = 1 - np.square(y - predicted).sum() / np.square(y - means).sum()
    np.testing.assert_allclose(scores.score.mean(), expected, rtol=1e-9)
    np.testing.assert_allclose(expected, r2_score(y, predicted), atol=0.02)
    np.testing.assert_allclose(scores.baseline, 0, atol=1e-12)
    assert np.isnan(scores.cross_entropy).all()
    e, v = (np.bincount(sample, np.square(y - guess)) for guess in (predicted, means))
    without = [1 - np.delete(e, i).sum() / np.delete(v, i).sum() for i in range(SAMPLES)]
    jackknife = np.std(without) * np.sqrt(SAMPLES - 1)
    np.testing.assert_allclose(scores.score.std() / np.sqrt(SAMPLES - 1), jackknife, rtol=0.1)


def test_the_baseline_is_the_majority_of_the_training_folds():
    x, y, sample = planted()
    fold = group_folds(DOCUMENTS, 4)[sample]
    tokens = cross_validated(x, y, fold, classes=True)
    for f in range(4):
        shares = np.bincount(y[fold != f]) / (fold != f).sum()
        np.testing.assert_array_equal(tokens.baseline[fold == f], y[fold == f] == shares.argmax())
        expected = -np.log(shares[y[fold == f]])
        np.testing.assert_allclose(tokens.baseline_cross_entropy[fold == f], expected)


def test_folds_never_share_a_document():
    fold = group_folds(DOCUMENTS, 4)
    assert {*fold} == {0, 1, 2, 3}
    for document in set(DOCUMENTS):
        assert len({f for f, d in zip(fold, DOCUMENTS, strict=True) if d == document}) == 1
    assert [*group_folds(["x"] * 5, 4)] == [0] * 5
    assert len({*group_folds(["x", "y", "x", "z"], 8)}) == 3


def test_a_label_of_a_document_cannot_be_learnt_from_its_other_windows():
    random = np.random.default_rng(0)
    names = [*"abcdefghijkl"] * 2
    code = {name: (i * 7) % 12 % 2 for i, name in enumerate("abcdefghijkl")}
    centres = {name: random.normal(size=20) * 5 for name in code}
    sample = np.repeat(np.arange(SAMPLES), TOKENS)
    x = np.stack([centres[names[i]] + random.normal(size=20) * 0.1 for i in sample])
    y = np.array([code[names[i]] for i in sample])
    assert scored(x, y, sample, documents=names).score.mean() < 0.75
    windows = scored(x, y, sample, documents=range(SAMPLES), folds=5)
    assert windows.score.mean() > 0.9  # the other window of its document tells


def test_random_labels_stay_at_chance_over_twenty_seeds():
    x, _, sample = planted()
    gains = []
    for seed in range(20):
        y = np.random.default_rng(100 + seed).integers(2, size=len(x))
        scores = scored(x, y, sample)
        gain = scores.score - 0.5
        gains.append(gain.mean() / (gain.std(ddof=1) / np.sqrt(SAMPLES)))
    assert np.sum(np.abs(gains) > 2.07) <= 4  # of a 95 % interval one in twenty
    assert abs(np.mean(gains)) < 1


def test_a_class_that_training_lacks_is_wrong_and_has_no_cross_entropy():
    x, y, sample = planted()
    y[sample == 5] = 3
    scores = scored(x, y, sample, documents=range(SAMPLES))
    assert scores.score[5] == 0 and np.isnan(scores.cross_entropy[5])
    assert np.isfinite(np.delete(scores.cross_entropy, 5)).all()


def test_one_class_is_told_by_its_baseline_and_one_fold_by_nothing():
    x, y, sample = planted()
    scores = scored(x, np.zeros_like(y), sample)
    assert (scores.score == 1).all() and (scores.baseline == 1).all()
    alone = scored(x, y, sample, documents=["a"] * SAMPLES)
    assert np.isnan(alone.score).all()
    constant = scored(x, np.ones(len(y)), sample, classes=False)
    assert np.isnan(constant.score).all()  # nothing to explain


@pytest.mark.parametrize("scale", [1e-250, 1e200])
def test_scores_do_not_depend_on_the_scale_of_states(scale):
    x, y, sample = planted()
    np.testing.assert_allclose(scored(x * scale, y, sample).score, scored(x, y, sample).score)


def test_states_without_variance_are_no_better_than_the_baseline():
    _, y, sample = planted()
    scores = scored(np.full((len(y), 3), 0.7), y, sample)
    np.testing.assert_allclose(scores.score, scores.baseline)
    np.testing.assert_allclose(scores.cross_entropy, scores.baseline_cross_entropy, atol=0.01)


def test_samples_without_labels_have_no_score():
    x, y, sample = planted()
    some = sample != 3
    scores = scored(x[some], y[some], sample[some])
    assert np.isnan(scores.score[3]) and scores.tokens[3] == 0 and scores.tokens[4] == TOKENS


def test_every_token_of_a_unit_has_its_random_label():
    y = np.array([0, 0, 0, 1] * 200)
    types = np.random.default_rng(0).integers(50, size=800)
    drawn = random_labels(y, types, (1,))
    assert all(len({*drawn[types == unit]}) == 1 for unit in range(50))
    assert {*drawn} == {0, 1} and 0.05 < drawn.mean() < 0.45  # as frequent as in y
    assert (random_labels(y, types, (2,)) != drawn).any()
    np.testing.assert_array_equal(random_labels(y, types, (1,)), drawn)


def test_shuffling_keeps_the_labels_and_the_units_whole():
    y = np.arange(12)
    shuffled = shuffled_labels(y, np.arange(12), (0,))
    assert sorted(shuffled) == [*y] and (shuffled != y).any()
    units = np.repeat([5, 2, 9], 4)
    by_unit = shuffled_labels(np.repeat([50, 20, 90], 4), units, (3,))
    assert sorted(by_unit[::4]) == [20, 50, 90]
    assert all(len({*by_unit[units == unit]}) == 1 for unit in units)


def test_fits_on_threads_are_those_of_one_and_in_order():
    x, y, sample = planted()
    fold = group_folds(DOCUMENTS, 4)[sample]
    jobs = [
        lambda s=s: cross_validated(x, (y + s * (sample % 2)) % 3, fold, classes=True)
        for s in range(4)
    ]
    one, two = (fit_together(jobs, threads=n)[0] for n in (1, 3))
    for a, b, job in zip(one, two, jobs, strict=True):
        np.testing.assert_array_equal(a.cross_entropy, b.cross_entropy)
        np.testing.assert_array_equal(a.cross_entropy, job().cross_entropy)


def test_fits_that_do_not_converge_are_counted_and_others_warnings_passed_on(monkeypatch):
    x, y, sample = planted()
    fold = group_folds(DOCUMENTS, 4)[sample]
    monkeypatch.setattr(linear_probes, "STEPS", 1)

    def job():
        return cross_validated(x, y, fold, classes=True)

    assert fit_together([job, job], threads=2)[1] == 8

    def loud():
        warnings.warn("of another kind", UserWarning, stacklevel=1)
        return job()

    with pytest.warns(UserWarning, match="of another kind"):
        fit_together([loud], threads=1)
    with pytest.warns(ConvergenceWarning):
        job()
