"""Intervals and paired differences, held against closed forms and numbers by hand."""

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.collapse.criteria import SIGNS
from loopscope.analysis.collapse.sign_values import Key
from loopscope.analysis.collapse.statistics import (
    bootstrap_mean,
    differences,
    paired_difference,
    unpaired_difference,
)

NAMES = [sign.name for sign in SIGNS]


def test_the_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_mean(rng.exponential(1.0, size=40))
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_equal_values_are_their_own_interval_and_one_has_none():
    assert bootstrap_mean(np.full(5, 2.5)) == (2.5, 2.5)
    assert np.isnan(bootstrap_mean(np.array([1.0]))).all()
    almost = np.array([1.0, 1.0 + 2e-16, 1.0, 1.0])
    assert bootstrap_mean(almost) == pytest.approx((1.0, 1.0))


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
    assert (same.mean, same.p) == (0.0, 1.0) and np.isnan(same.effect_size)
    assert (shifted.mean, shifted.p) == (0.5, 0.0) and np.isnan(shifted.effect_size)
    assert paired_difference(a[:1], a) is None


def test_an_unpaired_difference_is_welchs():
    a, b = pd.Series([1.0, 2.0, 3.0, 4.0]), pd.Series([2.0, 6.0])
    found = unpaired_difference(a, b)
    assert found.mean == pytest.approx(-1.5) and not found.paired and found.n == 2
    pooled = np.sqrt((a.var() + b.var()) / 2)
    assert found.effect_size == pytest.approx(-1.5 / pooled)
    assert 0 < found.p < 1 and found.low < -1.5 < found.high


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
    assert loss.loc["c", "p"] == 1.0 and loss["reason"].isna().all()


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
