"""Means over documents of unequal size, held against scipy, closed forms and simulated texts."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loopscope.analysis.collapse.clusters import (
    LEVEL,
    RESAMPLES,
    SEED,
    Totals,
    cautions,
    clusters_of,
    widened_level,
)
from loopscope.analysis.collapse.sign_values import NAMES


def samples(documents=None, *, n=40, models=("a",), windows=None):
    """What `per_sample` gives: values that are equal where the windows are."""
    windows = np.arange(n) if windows is None else np.asarray(windows)
    frames = []
    for model in models:
        values = {name: np.sqrt(windows + 2.0) for name in NAMES} | {"nonfinite": 0.0}
        frame = pd.DataFrame({"model": model, "loop": "core", "sample": np.arange(n), **values})
        frame.insert(1, "step", pd.array([pd.NA] * n, dtype="Int64"))
        if documents is not None:
            frame["document"] = pd.Categorical(documents)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def test_the_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    low, high = Totals.of(values).interval
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_samples_without_documents_are_scipys_bootstrap_of_the_mean():
    values = np.random.default_rng(3).exponential(size=12)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile",
        confidence_level=widened_level(12), rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    assert Totals.of(values).interval == pytest.approx(tuple(expected))
    assert Totals.of(values).error == pytest.approx(stats.sem(values))
    assert Totals.of(values, np.array(list("lkjihgfedcba"))).interval == pytest.approx(
        tuple(expected), rel=0.05
    )


def test_the_level_is_hesterbergs_and_tends_to_the_nominal_one():
    # √(8/7) · t(0.975; 7) = 2.5279: a normal variable lies within with probability 0.98853
    assert widened_level(8) == pytest.approx(0.98853, abs=1e-5)
    assert LEVEL < widened_level(10_000) < LEVEL + 1e-4


def test_the_mean_is_over_samples_and_its_error_over_documents():
    values = np.array([1.0, 2.0, 3.0, 10.0])
    totals = Totals.of(values, np.array(["x", "x", "x", "y"]))
    assert len(totals) == 2 and totals.mean == pytest.approx(4.0)
    # residuals −6 and 6: se² = 2/1 · 72/16
    assert totals.error == pytest.approx(3.0) and totals.freedom == 1
    half = 12.7062 * 3.0  # two clusters are too few to resample
    assert totals.interval == pytest.approx((4 - half, 4 + half), rel=1e-5)


def test_equal_documents_of_unequal_size_have_the_error_of_few_samples():
    sizes = [1, 4, 2, 9, 3, 5, 1, 2, 8, 6]
    values = np.random.default_rng(1).normal(size=10)
    labels = np.repeat(np.arange(10), sizes)
    totals, mean = Totals.of(values[labels], labels), np.average(values, weights=sizes)
    assert totals.mean == pytest.approx(mean)
    weights = np.array(sizes) / sum(sizes)
    error = np.sqrt(10 / 9 * (weights**2 * (values - mean) ** 2).sum())
    assert totals.error == pytest.approx(error)
    assert totals.interval.low < mean - error and totals.interval.high > mean + error
    single = Totals.of(values[labels])
    assert np.ptp(totals.interval) > 1.5 * np.ptp(single.interval)


def test_a_mean_far_from_zero_keeps_its_digits():
    values = np.random.default_rng(1).normal(size=50)
    near, far = Totals.of(values), Totals.of(values + 1e9)
    assert np.ptp(far.interval) == pytest.approx(np.ptp(near.interval), rel=1e-6)


def test_equal_values_are_their_own_interval_and_a_single_cluster_has_none():
    assert Totals.of(np.full(5, 0.1)).interval == (0.1, 0.1)
    assert Totals.of(np.full(20, 0.1), np.arange(20) // 2).interval == (0.1, 0.1)
    assert np.isnan(Totals.of(np.array([1.0])).interval).all()
    assert np.isnan(Totals.of(np.array([1.0, 2.0]), np.zeros(2)).interval).all()
    almost = np.array([1.0, 1.0 + 2e-16, 1.0, 1.0] * 3)
    assert Totals.of(almost).interval == pytest.approx((1.0, 1.0))


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng, documents = np.random.default_rng(0), 60
    inside, windows = 0, 0
    for _ in range(200):
        labels = np.repeat(np.arange(documents), rng.integers(1, 10, documents))
        values = rng.normal(size=documents)[labels] + rng.normal(size=len(labels))
        low, high = Totals.of(values, labels).interval
        inside += low <= 0 <= high
        half = 1.96 * stats.sem(values)
        windows += abs(values.mean()) <= half
    assert 0.92 <= inside / 200 <= 0.97 and windows / 200 < 0.8


def test_samples_of_one_document_are_one_cluster_and_others_their_own():
    names = [f"file {i // 4}" for i in range(36)] + [None] * 4
    clusters = clusters_of(samples(names))
    assert clusters.by_document and clusters.labels.nunique() == 9 + 4
    assert clusters.labels.groupby(names[:36] + list("wxyz")).nunique().eq(1).all()
    totals = clusters.totals(pd.Series([1.0, 2.0, 3.0], index=[0, 3, 39]))
    assert (len(totals), totals.documents) == (2, 2)


@pytest.mark.parametrize(
    ("names", "windows", "number"),
    [
        (None, None, 40),
        ([None] * 40, None, 40),
        (["book"] * 40, None, 40),
        ([f"file {i // 6}" for i in range(40)], None, 40),  # seven
        (["book"] * 40, np.arange(40) // 10, 4),
        (["book"] * 40, np.zeros(40), 1),
        ([f"row {i}" for i in range(40)], np.arange(40) % 20, 20),  # every row twice
    ],
)
def test_without_eight_documents_different_windows_are_clusters(names, windows, number):
    clusters = clusters_of(samples(names, windows=windows))
    totals = clusters.totals(pd.Series(np.arange(40.0)))
    assert not clusters.by_document
    assert (len(totals), totals.documents) == (number, 0)


def test_windows_of_which_nothing_is_finite_are_not_taken_for_repetitions():
    given = samples().assign(**dict.fromkeys(NAMES, np.nan)).assign(nonfinite=1.0)
    assert clusters_of(given).labels.nunique() == 40
    given.loc[:9, "loss"] = 2.0
    assert clusters_of(given).labels.nunique() == 31


def files(count, n=40):
    return [f"file {i % count}" for i in range(n)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (files(30), []),
        (files(29), ["29 documents are few"]),
        (files(8), ["8 documents are few"]),
        (files(7), ["7 documents are too few to resample, so windows are"]),
        (files(1), ["1 document is too few to resample"]),
        (None, ["documents of the text are not known"]),
        ([None] * 40, ["documents of the text are not known"]),
        ([None] * 3 + files(37)[3:], ["3 of 40 windows have no known document"]),
    ],
)
def test_cautions_tell_what_documents_are_lacking(names, expected):
    sentences = cautions(samples(names))
    assert len(sentences) == len(expected)
    assert all(part in s for part, s in zip(expected, sentences, strict=True))


def test_cautions_count_windows_that_repeat_others():
    few = cautions(samples(files(1), windows=np.arange(40) // 20))
    assert few[1] == "only 2 of 40 windows differ; the others repeat them"
    assert cautions(samples(files(31), windows=np.arange(40).clip(4))) == []  # four repetitions


def test_cautions_are_of_the_model_with_the_fewest_documents_and_said_once():
    given = samples(files(30), models=("a", "b"))
    assert cautions(given) == []
    given["document"] = given["document"].astype(object)
    given.loc[given["model"].eq("b"), "document"] = files(10)
    assert len(cautions(given)) == 1 and cautions(given)[0].startswith("10 documents")
    assert cautions(given.iloc[:0]) == []
