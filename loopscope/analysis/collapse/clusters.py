"""Means over samples that come in clusters: windows of one document are not independent.

A sample's cluster is its document; a sample without one is a cluster of its own. Intervals resample
whole clusters, and standard errors are cluster-robust: with n samples of mean m in G clusters,

    se² = G/(G − 1) · Σ_g (Σ_{i in g} (x_i − m))² / n²

(Cameron and Miller 2015), held against Student's t with G − 1 degrees of freedom. Where every
cluster is one sample these are the ordinary bootstrap, standard error and t-test.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from loopscope.analysis.collapse.sign_values import NAMES, by_key
from loopscope.names import FEWEST_DOCUMENTS

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
"""Of the bootstrap: the same tables give the same intervals."""

ENOUGH = 30
"""With fewer documents intervals of skewed measures are too narrow (docs/COLLAPSE.md)."""

MOST_REPEATED = 0.1
"""Above this share of windows that repeat others there is a caution."""


class Interval(NamedTuple):
    """A 95 % interval; NaN where there are too few samples."""

    low: float
    high: float


class Clusters(NamedTuple):
    """Which samples are not independent of each other.

    Attributes:
        labels: Of each sample's cluster, by sample; equal where samples belong together.
        by_document: Whether clusters are documents; if not, each is a window (and its repetitions).
    """

    labels: pd.Series
    by_document: bool

    def totals(self, values: pd.Series) -> "Totals":
        """Add up the numbers of each cluster.

        Args:
            values: By sample, all finite, at least one.

        Returns:
            The sums.
        """
        labels = self.labels.loc[values.index].to_numpy()
        return Totals.of(values.to_numpy(dtype=np.float64), labels, by_document=self.by_document)


def clusters_of(samples: pd.DataFrame) -> Clusters:
    """Group the samples of one checkpoint: by document, or else by window.

    Clusters are documents unless there are fewer than 8 of them, or none is known, or there are
    fewer windows that differ than documents. Then each window is a cluster; windows that agree in
    every sign are one.

    Args:
        samples: Rows of one checkpoint and loop as `per_sample` gives them, with the column
            document (null where it is not known) or without it.

    Returns:
        The clusters.
    """
    documents, windows = _document_codes(samples), _window_codes(samples)
    count, different = len(np.unique(documents)), len(np.unique(windows))
    enough = FEWEST_DOCUMENTS <= count <= different
    by_document = enough and bool(_known(samples).any())
    codes = documents if by_document else windows
    return Clusters(pd.Series(codes, index=samples["sample"].to_numpy()), by_document)


def _known(samples: pd.DataFrame) -> np.ndarray:
    """Of which samples the document is known."""
    if "document" not in samples:
        return np.zeros(len(samples), dtype=bool)
    return samples["document"].notna().to_numpy()


def _document_codes(samples: pd.DataFrame) -> np.ndarray:
    """A number for each document; a sample without one has a number of its own."""
    known = _known(samples)
    codes = np.arange(len(samples))
    if known.any():
        documents = samples["document"].to_numpy(dtype=object)[known]
        codes[known] = len(samples) + pd.factorize(documents)[0]
    return codes


def _window_codes(samples: pd.DataFrame) -> np.ndarray:
    """A number for each window; one for all that agree in every sign.

    Equal tokens give equal signs, and different ones do not, unless nothing is finite.
    """
    names = [name for name in NAMES if name in samples]
    codes = pd.factorize(pd.util.hash_pandas_object(samples[names], index=False))[0]
    empty = samples[names].drop(columns="nonfinite", errors="ignore").isna().all(axis=1).to_numpy()
    codes[empty] = len(samples) + np.arange(empty.sum())
    return codes


@dataclass(frozen=True)
class Totals:
    """Numbers added up over clusters: all that the mean, its interval and its test need.

    Attributes:
        origin: Subtracted from every number before adding, against rounding.
        sums: Of each cluster's numbers less `origin`.
        counts: How many numbers each cluster has.
        documents: How many of the clusters are documents: all or none.
    """

    origin: float
    sums: np.ndarray
    counts: np.ndarray
    documents: int = 0

    @classmethod
    def of(
        cls, values: np.ndarray, labels: np.ndarray | None = None, *, by_document: bool = False
    ) -> "Totals":
        """Add up numbers.

        Args:
            values: One per sample, all finite, at least one.
            labels: Each one's cluster; every sample is a cluster of its own when not given.
            by_document: Whether clusters are documents.

        Returns:
            The sums.
        """
        codes = pd.factorize(np.arange(len(values)) if labels is None else labels)[0]
        counts = np.bincount(codes).astype(np.float64)
        sums = np.bincount(codes, values - values[0])
        return cls(float(values[0]), sums, counts, len(counts) if by_document else 0)

    def __len__(self) -> int:
        """How many clusters there are."""
        return len(self.sums)

    @property
    def mean(self) -> float:
        """Over samples, not over clusters."""
        return self.origin + float(self.sums.sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Cluster-robust standard error of the mean; NaN of one cluster."""
        G = len(self)
        if G < 2:
            return np.nan
        residuals = self.sums - self.counts * (self.sums.sum() / self.counts.sum())
        return float(np.sqrt(G / (G - 1) * (residuals**2).sum()) / self.counts.sum())

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error: clusters less one."""
        return float(len(self) - 1)

    @property
    def interval(self) -> Interval:
        """Of the mean: from resampled clusters, of fewer than 8 from Student's t; NaN of one."""
        G = len(self)
        if G < 2:
            return Interval(np.nan, np.nan)
        if G < FEWEST_DOCUMENTS:
            return t_interval(self.mean, self.error, self.freedom)
        ends = stats.bootstrap(
            (self.sums, self.counts), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES,
            confidence_level=widened_level(G), method="percentile", rng=np.random.default_rng(SEED),
        ).confidence_interval  # fmt: skip
        return Interval(self.origin + float(ends.low), self.origin + float(ends.high))


def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """Mean over samples from sums over clusters.

    Args:
        sums: Of each cluster.
        counts: Samples of each cluster.
        axis: Along which the clusters lie.

    Returns:
        Sum of the sums over sum of the counts.
    """
    return sums.sum(axis) / counts.sum(axis)


def widened_level(clusters: int) -> float:
    """Level of a percentile interval that holds the mean as often as 95 % promise.

    Percentiles of resampled means are too close together by about √((G − 1)/G) · z/t with t of
    G − 1 degrees of freedom, which this makes good (the expanded percentile interval: Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015).

    Args:
        clusters: G, how many are resampled; at least 2.

    Returns:
        The level; tends to 0.95 from above.
    """
    G = clusters
    t = stats.t.ppf((1 + LEVEL) / 2, G - 1)
    return float(1 - 2 * stats.norm.sf(np.sqrt(G / (G - 1)) * t))


def t_interval(mean: float, error: float, freedom: float) -> Interval:
    """Student's 95 % interval.

    Args:
        mean: Its middle.
        error: Standard error of the mean.
        freedom: Degrees of freedom.

    Returns:
        The interval.
    """
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Interval(mean - half, mean + half)


def cautions(samples: pd.DataFrame) -> list[str]:
    """What a reader should know of the samples before trusting intervals.

    Args:
        samples: What `per_sample` gives; of models that read different windows, those with the
            fewest clusters count.

    Returns:
        Sentences; none where at least 30 documents are known and few windows repeat others.
    """
    first = {key.model: rows for key, rows in reversed(by_key(samples).items())}
    if not first:
        return []
    return min((_cautions(rows) for rows in first.values()), key=lambda c: c[0])[1]


def _cautions(samples: pd.DataFrame) -> tuple[int, list[str]]:
    """How many clusters the samples of one checkpoint have, and what to say of them."""
    clusters, known = clusters_of(samples), _known(samples)
    count, windows = clusters.labels.nunique(), len(np.unique(_window_codes(samples)))
    documents, n = len(np.unique(_document_codes(samples)[known])), len(samples)
    sentences = []
    if not known.any():
        sentences.append(
            "the documents of the text are not known: windows count as independent, and where they "
            "are not, intervals are too narrow"
        )
    elif not clusters.by_document and documents < FEWEST_DOCUMENTS:
        noun = "1 document is" if documents == 1 else f"{documents} documents are"
        sentences.append(
            f"{noun} too few to resample, so windows are: intervals and verdicts hold for this "
            "text alone"
        )
    elif not known.all():
        sentences.append(
            f"{n - known.sum()} of {n} windows have no known document and count as independent"
        )
    if clusters.by_document and count < ENOUGH:
        sentences.append(
            f"{count} documents are few: intervals may be too narrow; {ENOUGH} or more are better"
        )
    if windows < (1 - MOST_REPEATED) * n:
        sentences.append(f"only {windows} of {n} windows differ; the others repeat them")
    return count, sentences
