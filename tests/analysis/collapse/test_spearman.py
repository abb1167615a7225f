"""Spearman's ρ over places: against scipy and pandas, with an interval by document."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from loopscope.analysis.collapse import rank_correlation
from tests.figures.effect_tables import effect_table


def rows(**changes) -> pd.DataFrame:
    frame = effect_table(K=2, B=4, **changes).effect
    return frame[frame["kind"].eq("write") & frame["routers"].eq("recomputed")]


def test_rho_is_scipys_of_the_means_over_samples():
    frame = rows()
    means = frame.groupby("what", observed=True)[["mass", "loss"]].mean()
    result = rank_correlation(frame, "mass", "loss", ["what"])
    assert result.rho == pytest.approx(spearmanr(means["mass"], means["loss"]).statistic)
    assert result.rho == pytest.approx(means["mass"].corr(means["loss"], method="spearman"))
    assert (result.places, result.clusters) == (12, 16)


def test_ties_have_the_mean_rank_as_in_scipy():
    frame = rows()
    order = {what: i // 3 for i, what in enumerate(frame["what"].unique())}
    frame = frame.assign(mass=frame["what"].map(order).astype(float))
    means = frame.groupby("what", observed=True)[["mass", "loss"]].mean()
    result = rank_correlation(frame, "mass", "loss", ["what"])
    assert result.rho == pytest.approx(spearmanr(means["mass"], means["loss"]).statistic)


def test_the_interval_is_that_of_resampled_documents_by_hand():
    frame = rows(samples=10)
    pair = frame.assign(document="file" + (frame["sample"] // 1).astype(str))
    result = rank_correlation(pair, "mass", "loss", ["what"])
    by_sample = pair.pivot(index="sample", columns="what", values="loss").to_numpy()
    mass = pair.pivot(index="sample", columns="what", values="mass").to_numpy()
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 10, 10) for _ in range(600)]
    rhos = [spearmanr(mass[d].mean(0), by_sample[d].mean(0)).statistic for d in drawn]
    low, high = np.percentile(rhos, [2.5, 97.5])
    assert result.low == pytest.approx(low, abs=0.03) and result.high == pytest.approx(
        high, abs=0.03
    )
    assert result.low <= result.rho <= result.high


def test_windows_of_one_document_count_once():
    frame = rows(samples=10)
    twice = pd.concat([frame, frame.assign(sample=frame["sample"] + 10)])
    assert rank_correlation(twice, "mass", "loss", ["what"]) == rank_correlation(
        frame, "mass", "loss", ["what"]
    )


def test_nothing_correlates_with_what_is_the_same_everywhere():
    frame = rows()
    assert np.isnan(rank_correlation(frame.assign(loss=0.0), "mass", "loss", ["what"]).rho)
    few = frame[frame["what"].isin(["write m0@0", "write m1@0", "write m2@0"])]
    assert np.isnan(rank_correlation(few, "mass", "loss", ["what"]).rho)
    flagged = frame.assign(flag="nonfinite")
    assert rank_correlation(flagged, "mass", "loss", ["what"]).places == 0


def test_unrelated_masses_and_effects_have_an_interval_about_zero():
    rng = np.random.default_rng(0)
    frame = rows(samples=40)
    frame = frame.assign(mass=rng.normal(size=len(frame)), loss=rng.normal(size=len(frame)))
    result = rank_correlation(frame, "mass", "loss", ["what"])
    assert result.low < 0 < result.high
