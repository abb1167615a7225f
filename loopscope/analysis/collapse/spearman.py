"""Spearman's ρ of two measured columns over places, with an interval by document."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from loopscope.analysis.collapse.clusters import LEVEL, RESAMPLES, SEED
from loopscope.analysis.tables import aggregate

FEWEST_PLACES = 4
"""Of fewer places no rank correlation is told."""


class RankCorrelation(NamedTuple):
    """Spearman's ρ between the means of two columns.

    Attributes:
        rho: ρ; NaN where there are too few places, or one of the columns is the same everywhere.
        low, high: Its 95 % interval; NaN of fewer than two clusters of samples.
        places: How many places it ranks.
        clusters: How many documents (or windows) were resampled.
    """

    rho: float
    low: float
    high: float
    places: int
    clusters: int


def rank_correlation(frame: pd.DataFrame, x: str, y: str, by: list[str]) -> RankCorrelation:
    """Correlate the ranks of places by two measured columns (Spearman's ρ).

    ρ is that of the means over samples, place by place. The interval is of the percentile
    bootstrap: whole documents are resampled (windows where fewer than 8 are known), the means
    taken and ranked anew; which places there are stays fixed.

    Args:
        frame: Rows of one checkpoint, one per place and sample.
        x: A column.
        y: Another.
        by: The columns that name a place.

    Returns:
        ρ with its interval. Rows without a sound value of both columns are left out.
    """
    part = frame[aggregate.sound(frame, x) & aggregate.sound(frame, y)]
    if part.empty:
        return RankCorrelation(np.nan, np.nan, np.nan, 0, 0)
    cluster = pd.factorize(aggregate.clusters(part))[0]
    place = part.groupby(by, observed=True, sort=False, dropna=False).ngroup().to_numpy()
    shape = (cluster.max() + 1, place.max() + 1)
    counts, sums_x, sums_y = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    np.add.at(counts, (cluster, place), 1.0)
    np.add.at(sums_x, (cluster, place), part[x].to_numpy(dtype=np.float64))
    np.add.at(sums_y, (cluster, place), part[y].to_numpy(dtype=np.float64))
    G, places = shape
    if places < FEWEST_PLACES:
        return RankCorrelation(np.nan, np.nan, np.nan, places, G)
    once = np.ones((1, G))
    rho = _spearman(_means(once, sums_x, counts), _means(once, sums_y, counts))[0]
    if G < 2 or not np.isfinite(rho):
        return RankCorrelation(float(rho), np.nan, np.nan, places, G)
    drawn = np.random.default_rng(SEED).multinomial(G, np.full(G, 1 / G), RESAMPLES)
    resampled = _spearman(_means(drawn, sums_x, counts), _means(drawn, sums_y, counts))
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    return RankCorrelation(float(rho), float(low), float(high), places, G)


def _means(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of each place in each resample, (resample, place); NaN where none of it was drawn."""
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ρ of each row; NaN where a row is constant."""
    a, b = (stats.rankdata(v, axis=1) for v in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    products = (a * b).sum(1)
    ratio = np.full_like(products, np.nan)
    np.divide(products, norms, out=ratio, where=norms > 0)
    return ratio
