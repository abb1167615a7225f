"""Differences between checkpoints, held against closed forms, scipy and numbers by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loopscope.analysis.collapse.clusters import Clusters
from loopscope.analysis.collapse.criteria import SIGNS
from loopscope.analysis.collapse.sign_values import Key
from loopscope.analysis.collapse.statistics import (
    differences,
    paired_difference,
    summarised,
    unpaired_difference,
)
from loopscope.analysis.tables import Tables

NAMES = [sign.name for sign in SIGNS]


def test_a_paired_difference_is_the_t_test_of_the_differences():
    a = pd.Series([3.0, 5.0, 4.0, 9.0], index=[0, 1, 2, 7])
    b = pd.Series([1.0, 2.0, 4.0, 8.0], index=[0, 1, 2, 5])
    found = paired_difference(a, b)  # 2, 3, 0 of the samples 0, 1, 2
    assert (found.n, found.paired) == (3, True)
    assert found.mean == pytest.approx(5 / 3)
    assert found.effect_size == pytest.approx((5 / 3) / np.std([2, 3, 0], ddof=1))
    # t = 1.8898 with two degrees of freedom: p = 1 − t/sqrt(t² + 2)
    t = found.effect_size * np.sqrt(3)
    assert found.p == pytest.approx(1 - t / np.sqrt(t * t + 2))
    assert found.low <= found.mean <= found.high


def test_differences_that_do_not_vary_need_no_test():
    a = pd.Series([1.0, 2.0, 3.0])
    same, shifted = paired_difference(a, a), paired_difference(a + 0.5, a)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
    assert np.isnan(same.p) and np.isnan(same.effect_size)  # nothing against nothing
    assert (shifted.mean, shifted.p) == (0.5, 0.0) and np.isnan(shifted.effect_size)
    assert paired_difference(a[:1], a) is None


def test_an_unpaired_difference_is_welchs():
    a, b = pd.Series([1.0, 2.0, 3.0, 4.0]), pd.Series([2.0, 6.0])
    found = unpaired_difference(a, b)
    assert found.mean == pytest.approx(-1.5) and not found.paired and found.n == 2
    pooled = np.sqrt((a.var() + b.var()) / 2)
    assert found.effect_size == pytest.approx(-1.5 / pooled)
    assert 0 < found.p < 1 and found.low < -1.5 < found.high


def by_document(*labels):
    """Clusters of samples 0, 1, … by document."""
    return Clusters(pd.Series(labels), by_document=True)


def test_pairs_of_one_document_are_tested_together():
    d = pd.Series([0.3, -0.1, 0.4, 0.9, 1.1, 0.2, -0.5, 0.6, 0.8, 0.1, 0.7, -0.2])
    b = pd.Series(np.linspace(1, 3, 12))
    files = by_document(0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5)
    difference = paired_difference(b + d, b, files)
    # statsmodels 0.15.0: OLS(d, ones).fit(cov_type="cluster", cov_kwds={"groups": files},
    # use_t=True), its standard error, p and conf_int()
    assert difference.p == pytest.approx(0.05613362854052343)
    assert (difference.low, difference.high) == pytest.approx((-0.01372741, 0.73039408))
    assert (difference.n, difference.clusters, difference.documents) == (12, 6, 6)
    assert difference.effect_size == pytest.approx(d.mean() / d.std())


def test_pairs_of_twelve_documents_are_those_documents_t_test():
    rng = np.random.default_rng(4)
    a, b = pd.Series(rng.normal(size=12)), pd.Series(rng.normal(size=12))
    difference = paired_difference(a, b, by_document(*range(12)))
    assert difference.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert difference == paired_difference(a, b)._replace(documents=12)
    # every pair twice in its document says nothing more
    twice = pd.concat([a, a], ignore_index=True), pd.concat([b, b], ignore_index=True)
    doubled = paired_difference(*twice, by_document(*range(12), *range(12)))
    assert doubled.p == pytest.approx(difference.p)
    assert (doubled.low, doubled.high) == pytest.approx((difference.low, difference.high))
    assert paired_difference(*twice).p < difference.p


def test_pairs_left_out_leave_their_documents_out():
    a, b = pd.Series(np.arange(10.0) ** 2), pd.Series(np.arange(10.0))
    b[[8, 9]] = np.nan
    difference = paired_difference(a, b, by_document(0, 0, 1, 1, 2, 2, 3, 3, 4, 4))
    assert (difference.n, difference.documents) == (8, 4)


def test_one_document_alone_has_no_interval_and_no_test():
    a, b = pd.Series([1.0, 2.0, 4.0]), pd.Series([0.0, 2.0, 3.0])
    for difference in (
        paired_difference(a, b, by_document(0, 0, 0)),
        unpaired_difference(a, b, (by_document(0, 0, 0), by_document(0, 1, 2))),
    ):
        assert difference.mean == pytest.approx(2 / 3) and difference.clusters == 1
        assert np.isnan([difference.low, difference.high, difference.p]).all()


@pytest.mark.parametrize("sizes", [(30, 45), (5, 9)])
def test_unpaired_documents_of_one_sample_are_welchs_test(sizes):
    rng = np.random.default_rng(2)
    a, b = (pd.Series(rng.normal(i, 1 + i, n)) for i, n in enumerate(sizes))
    difference = unpaired_difference(a, b)
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert difference.p == pytest.approx(welch.pvalue)
    low, high = welch.confidence_interval()
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_unpaired_windows_count_by_document():
    rng = np.random.default_rng(2)
    a, b = (pd.Series(np.repeat(rng.normal(i, 1, 20), 3)) for i in range(2))
    files = by_document(*np.repeat(np.arange(20), 3))
    difference = unpaired_difference(a, b, (files, files))
    each = unpaired_difference(a[::3], b[::3])
    assert difference.p == pytest.approx(each.p)
    assert (difference.low, difference.high) == pytest.approx((each.low, each.high))
    assert (difference.n, difference.documents, difference.clusters) == (60, 20, 20)


def test_unpaired_numbers_that_do_not_vary_need_no_test():
    a = pd.Series([2.0, 2.0, 2.0])
    same, shifted = unpaired_difference(a, a), unpaired_difference(a + 1, a)
    assert same.mean == 0 and np.isnan(same.p)
    assert (shifted.mean, shifted.low, shifted.high, shifted.p) == (1.0, 1.0, 1.0, 0.0)


def samples(**models):
    """What `per_sample` gives: each model's loss per sample; its other signs are that times ten."""
    rows = []
    for name, losses in models.items():
        model, _, step = name.partition("_")
        for i, loss in enumerate(losses):
            told = {"model": model, "step": int(step) if step else None, "loop": "core"}
            values = {sign: loss if sign == "loss" else 10 * loss for sign in NAMES}
            rows.append({**told, "sample": i, **values})
    return pd.DataFrame(rows).astype({"step": "Int64"})


def test_every_model_is_held_against_the_first():
    table = differences(samples(a=[1.0, 2.0, 4.0], b=[2.0, 2.5, 4.0], c=[1.0, 2.0, 4.0]))
    loss = table[table["sign"].eq("loss")].set_index("model")
    assert loss["mean"].to_dict() == pytest.approx({"b": 0.5, "c": 0.0})
    assert np.isnan(loss.loc["c", "p"]) and loss["reason"].isna().all()


def test_p_values_are_corrected_for_their_number():
    rng = np.random.default_rng(1)
    given = samples(a=rng.normal(size=30), b=rng.normal(size=30))
    given["skew"] += given["model"].eq("b") * 40  # one true difference among sixteen
    table = differences(given).set_index("sign")
    p = table["p"].to_numpy()
    order = np.argsort(p)
    stepped = p[order] * len(p) / np.arange(1, len(p) + 1)
    by_hand = np.empty_like(p)
    by_hand[order] = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(table["p_adjusted"], by_hand)
    assert table["p_adjusted"].idxmin() == "skew" and (table["p_adjusted"] >= p).all()


def test_what_compares_nothing_with_nothing_corrects_nothing():
    rng = np.random.default_rng(1)
    given = samples(a=rng.normal(size=30), b=rng.normal(size=30))
    given["nonfinite"] = 0.0  # in both
    table = differences(given).set_index("sign")
    row = table.loc["nonfinite"]
    assert (row["mean"], row["low"], row["high"]) == (0.0, 0.0, 0.0) and row["reason"] is None
    assert np.isnan(row["p"]) and np.isnan(row["p_adjusted"])
    others = table.drop(index="nonfinite")
    np.testing.assert_allclose(others["p_adjusted"], stats.false_discovery_control(others["p"]))


def test_signs_and_differences_are_by_document_where_it_is_known():
    rng = np.random.default_rng(6)
    given = samples(a=rng.normal(size=36), b=rng.normal(size=36))
    files = given.assign(document=[f"file {i // 3}" for i in given["sample"]])
    for make in (differences, lambda frame: summarised(frame, Tables())):
        alone, together = make(given).iloc[0], make(files).iloc[0]
        assert (alone["documents"], alone["clusters"]) == (0, 36)
        assert (together["documents"], together["clusters"]) == (12, 12)
        assert alone["mean"] == together["mean"] and alone["low"] != together["low"]
    other = differences(files, tokens={"a": "x", "b": "y"}).set_index("sign").loc["skew"]
    assert (other["paired"], other["documents"], other["clusters"]) == (False, 12, 12)
    means = files[files["model"].eq("a")].groupby("document")["loss"].mean()
    row = summarised(files, Tables()).iloc[0]
    expected = stats.bootstrap(
        (means,), np.mean, n_resamples=50_000, method="percentile", confidence_level=0.969,
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.03 * np.ptp(expected))


def test_other_tokens_leave_pairs_and_losses_out():
    given = samples(a=[1.0, 2.0, 4.0], b=[2.0, 2.5, 4.0], c=[2.0, 2.5, 4.0])
    table = differences(given, tokens={"a": "x", "b": "y", "c": "x"})
    told = table[table["model"].eq("b")].set_index("sign")
    assert "tokenizers differ" in told.loc["loss", "reason"] and np.isnan(told.loc["loss", "mean"])
    assert not told.loc["skew", "paired"] and told.loc["skew", "mean"] == pytest.approx(5.0)
    other = table[table["model"].eq("c")].set_index("sign")  # reads what a reads
    assert other["paired"].all() and other.loc["loss", "mean"] == pytest.approx(0.5)


def test_what_depends_on_the_loops_run_is_compared_between_equal_numbers():
    given = samples(a=[1.0, 2.0, 4.0], b=[2.0, 2.5, 4.0])
    keys = {name: Key(name, None, "core") for name in "ab"}
    depth = {keys["a"]: (3, 6), keys["b"]: (3, 3)}
    told = differences(given, depth=depth).set_index("sign")
    assert told.loc["step_ratio", "reason"] == told.loc["more_loss", "reason"]
    assert "numbers of loops" in told.loc["step_ratio", "reason"]
    assert told["reason"].notna().sum() == 2
    assert differences(given, depth=dict.fromkeys(depth, (3, 6)))["reason"].isna().all()


def test_what_is_missing_says_where():
    given = samples(a=[1.0, 2.0, 4.0], b=[2.0, 2.5, 4.0])
    given.loc[given["model"].eq("b"), "skew"] = np.nan
    given.loc[given["model"].eq("a"), "loss"] = np.nan
    told = differences(given).set_index("sign")["reason"]
    assert told["skew"] == "it could not be measured there"
    assert told["loss"] == "it could not be measured in the reference"


def test_steps_are_held_against_the_same_step_of_the_first_run():
    given = samples(
        a_100=[1.0, 2.0], a_200=[3.0, 3.0], b_100=[2.0, 2.5], b_300=[5.0, 5.5], twin=[9.0, 9.5]
    )
    table = differences(given, skip=frozenset({"twin"}))
    loss = table[table["sign"].eq("loss")].set_index(["model", "step"])
    assert loss["against_step"].to_dict() == {("a", 200): 100, ("b", 100): 100, ("b", 300): 200}
    assert loss.loc[("b", 300), "mean"] == pytest.approx(2.25)
