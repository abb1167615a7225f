"""Means with intervals, and paired differences between checkpoints (scipy does the statistics)."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from loopscope.analysis.collapse.clusters import (
    RESAMPLES,
    SEED,
    Clusters,
    Interval,
    Totals,
    clusters_of,
    ratio,
    t_interval,
    widened_level,
)
from loopscope.analysis.collapse.criteria import SIGNS, Sign
from loopscope.analysis.collapse.sign_values import Key, by_key, per_sample
from loopscope.analysis.tables import Tables
from loopscope.names import FEWEST_DOCUMENTS, KEYS


def signs(tables: Tables) -> pd.DataFrame:
    """Each sign's mean over samples with its interval, one row per checkpoint, loop and sign.

    Args:
        tables: As in `per_sample`.

    Returns:
        model, step, loop, sign, mean, std (ddof = 1), low and high (95 % interval of the mean), n
        (samples averaged), documents (how many the interval resampled; 0 where it resampled
        windows, as of fewer than 8 documents or of text without), clusters (how many documents or
        different windows it resampled), n_flagged (samples left out; none of a sign that has no
        value in any sample); checkpoints and signs in order.

    Raises:
        InputError: if a table is missing.
    """
    return summarised(per_sample(tables), tables)


def summarised(samples: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    """Average the signs of every sample.

    Args:
        samples: What `per_sample` gave for these tables.
        tables: Tell which models' loss was measured.

    Returns:
        As `signs`.
    """
    with_loss = set() if tables.loss is None else set(tables.loss["model"].astype(str))
    rows = []
    for key, part in by_key(samples).items():
        clusters, values = clusters_of(part), part.set_index("sample")
        for sign in SIGNS:
            column = values[sign.name].dropna()
            n, totals = len(column), clusters.totals(column) if len(column) else None
            measured = n > 0 or (sign.name == "loss" and key.model in with_loss)
            rows.append(
                {
                    **key._asdict(),
                    "sign": sign.name,
                    "mean": column.mean(),
                    "std": column.std(),
                    **(totals.interval if totals else Interval(np.nan, np.nan))._asdict(),
                    "n": n,
                    "documents": totals.documents if totals else 0,
                    "clusters": len(totals) if totals else 0,
                    "n_flagged": len(part) - n if measured else 0,
                }
            )
    return pd.DataFrame(rows).astype({"step": "Int64"})


class Difference(NamedTuple):
    """How the mean of one set of numbers differs from that of another.

    Attributes:
        mean: Of the differences (the first minus the second).
        low, high: 95 % interval; NaN of a single cluster.
        effect_size: Cohen's d: the mean over the standard deviation, of the differences where they
            are paired (d_z), else pooled; NaN where nothing varies.
        p: Of a cluster-robust t-test, paired or Welch's; NaN of a single cluster, and where both
            are equal throughout: nothing is then compared with nothing.
        n: Pairs, or the smaller number of samples.
        documents: How many were resampled, on the side with fewer; 0 where windows were.
        clusters: How many documents or different windows were resampled, on the side with fewer.
        paired: Whether both were measured on the same samples.
    """

    mean: float
    low: float
    high: float
    effect_size: float
    p: float
    n: int
    documents: int
    clusters: int
    paired: bool


def paired_difference(
    a: pd.Series, b: pd.Series, clusters: Clusters | None = None
) -> Difference | None:
    """Difference of two signs on the same samples.

    Args:
        a: Values by sample number.
        b: The same; a sample that one of them lacks is left out.
        clusters: Which samples belong together; none do when not given.

    Returns:
        The difference a − b, or None below two pairs.
    """
    d = (a - b).dropna()
    if len(d) < 2:
        return None
    totals = clusters.totals(d) if clusters else Totals.of(d.to_numpy(dtype=np.float64))
    size = np.nan if _constant(d) else float(d.mean() / d.std())
    p = _p_value(d.mean(), totals.error, totals.freedom) if d.any() else np.nan
    counts = len(d), totals.documents, len(totals)
    return Difference(float(d.mean()), *totals.interval, size, p, *counts, True)


def unpaired_difference(
    a: pd.Series,
    b: pd.Series,
    clusters: tuple[Clusters, Clusters] | None = None,
) -> Difference | None:
    """Difference of two signs on different samples, as of models with different tokenizers.

    Documents of the two sides are resampled independently of each other, also where they are the
    same: the interval is then rather too wide.

    Args:
        a: Values by sample number.
        b: The same; other samples.
        clusters: Which samples of each side belong together; none do when not given.

    Returns:
        The difference of the means, or None below two samples.
    """
    a, b = a.dropna(), b.dropna()
    n = min(len(a), len(b))
    if n < 2:
        return None
    x, y = (
        side.totals(values) if side else Totals.of(values.to_numpy(dtype=np.float64))
        for side, values in zip(clusters or (None, None), (a, b), strict=True)
    )
    mean = float(a.mean() - b.mean())
    nothing = _constant(a) and _constant(b)
    size = np.nan if nothing else float(mean / np.sqrt((a.var() + b.var()) / 2))
    error, freedom = _welch(x, y)
    p = np.nan if nothing and not mean else _p_value(mean, error, freedom)
    counts = n, min(x.documents, y.documents), min(len(x), len(y))
    return Difference(mean, *_unpaired_interval(x, y), size, p, *counts, False)


def _constant(values: pd.Series) -> bool:
    """Whether values differ by no more than rounding."""
    return bool(np.ptp(values) <= 1e-12 * values.abs().max())


def _p_value(mean: float, error: float, freedom: float) -> float:
    """Two-sided p of a t-test; of an error that is nothing but rounding, 0 or 1."""
    if error <= 1e-12 * abs(mean):
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def _welch(x: Totals, y: Totals) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom."""
    v, w = x.error**2, y.error**2
    if not v + w > 0:  # of a single cluster, or nothing varies
        return float(np.sqrt(v + w)), min(x.freedom, y.freedom)
    freedom = (v + w) ** 2 / (v**2 / x.freedom + w**2 / y.freedom)
    return float(np.sqrt(v + w)), float(freedom)


def _unpaired_interval(x: Totals, y: Totals) -> Interval:
    """Interval of the difference of two means, both sides resampled."""
    mean, (error, freedom), fewest = x.mean - y.mean, _welch(x, y), min(len(x), len(y))
    if fewest < FEWEST_DOCUMENTS or not error:
        return t_interval(mean, error, freedom)

    def difference(i: np.ndarray, j: np.ndarray, axis: int) -> np.ndarray:
        return ratio(x.sums[i], x.counts[i], axis) - ratio(y.sums[j], y.counts[j], axis)

    ends = stats.bootstrap(
        (np.arange(len(x)), np.arange(len(y))), difference, vectorized=True,
        n_resamples=RESAMPLES, confidence_level=widened_level(fewest), method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    shift = x.origin - y.origin
    return Interval(shift + float(ends.low), shift + float(ends.high))


def differences(
    samples: pd.DataFrame,
    *,
    tokens: Mapping[str, str] | None = None,
    depth: Mapping[Key, tuple[int, int]] | None = None,
    skip: frozenset[str] = frozenset(),
) -> pd.DataFrame:
    """Every checkpoint against the first model, sign by sign.

    The steps of the first model are held against its first step; those of another against the
    first model at the same step, or at its end where it has no such step.

    Args:
        samples: What `per_sample` gives; the first model is the reference. Loops are paired by
            name, others with the reference's first.
        tokens: Something for each model that is equal where the windows of tokens are (their hash).
            Where it differs, differences are unpaired, and those of signs that count per token are
            withheld.
        depth: K and T, the most loops run; signs that depend on T are withheld where they differ.
        skip: Models that are not compared (untrained twins).

    Returns:
        model, step, loop, against_step (null outside a series) and against_loop of the reference,
        sign, mean, low, high, effect_size, p, p_adjusted (Benjamini-Hochberg over all rows that
        have a p), n, documents, clusters (as in `signs`), paired, reason (why there is no
        difference; None where there is).
    """
    groups = {key: rows for key, rows in by_key(samples).items() if key.model not in skip}
    parts = {key: rows.set_index("sample") for key, rows in groups.items()}
    clusters = {key: clusters_of(rows) for key, rows in groups.items()}
    rows, nan = [], float("nan")
    for key, against in _pairs(list(parts)):
        same_tokens = tokens is None or tokens.get(key.model) == tokens.get(against.model)
        same_depth = depth is None or depth.get(key) == depth.get(against)
        names = {"against_step": against.step, "against_loop": against.loop}
        for sign in SIGNS:
            a, b = parts[key][sign.name], parts[against][sign.name]
            reason = _incomparable(sign, a, b, same_tokens=same_tokens, same_depth=same_depth)
            difference = None
            if reason is None:
                if same_tokens:
                    difference = paired_difference(a, b, clusters[key])
                else:
                    difference = unpaired_difference(a, b, (clusters[key], clusters[against]))
                reason = None if difference else "fewer than two samples have it in both"
            numbers = difference or Difference(nan, nan, nan, nan, nan, 0, 0, 0, same_tokens)
            row = {**key._asdict(), **names, "sign": sign.name, **numbers._asdict()}
            rows.append({**row, "reason": reason})
    columns = [*KEYS, "against_step", "against_loop", "sign", *Difference._fields, "reason"]
    table = pd.DataFrame(rows, columns=columns).astype({"step": "Int64", "against_step": "Int64"})
    table.insert(columns.index("p") + 1, "p_adjusted", np.nan)
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p_adjusted"] = stats.false_discovery_control(table.loc[tested, "p"])
    return table


def _incomparable(
    sign: Sign, a: pd.Series, b: pd.Series, *, same_tokens: bool, same_depth: bool
) -> str | None:
    """Why a sign of a checkpoint (a) is not held against the reference's (b); None if it is."""
    if a.count() < 2:
        return "it could not be measured there"
    if b.count() < 2:
        return "it could not be measured in the reference"
    if sign.name in ("more_loss", "step_ratio") and not same_depth:
        return "other numbers of loops were run"
    if sign.per_token and not same_tokens:
        return "it counts per token, and the tokenizers differ"
    return None


def _pairs(keys: list[Key]) -> Iterator[tuple[Key, Key]]:
    """Each checkpoint and what it is held against."""
    model = keys[0].model if keys else ""
    references = [key for key in keys if key.model == model]
    loops = [reference.loop for reference in references]
    for key in keys:
        loop = key.loop if key.loop in loops else loops[0]
        steps = [reference.step for reference in references if reference.loop == loop]
        same = key.step if key.step in steps else steps[-1]
        step = steps[0] if key.model == model else same
        against = Key(model, step, loop)
        if against != key:
            yield key, against
