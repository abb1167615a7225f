"""Means with intervals, and paired differences between checkpoints (scipy does the statistics)."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from loopscope.analysis.collapse.criteria import SIGNS, Sign
from loopscope.analysis.collapse.sign_values import Key, by_key, per_sample
from loopscope.analysis.tables import Tables
from loopscope.names import KEYS

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
"""Of the bootstrap: the same tables give the same intervals."""


class Interval(NamedTuple):
    """A 95 % interval; NaN where there are too few samples."""

    low: float
    high: float


def bootstrap_mean(values: np.ndarray) -> Interval:
    """Bootstrap interval of a mean (bias-corrected and accelerated, Efron 1987).

    Args:
        values: One number per sample, all finite.

    Returns:
        The interval; the value itself where all are equal, NaN below two samples.
    """
    if len(values) < 2:
        return Interval(np.nan, np.nan)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]))
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL,
        method=_method(values), rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return Interval(float(interval.low), float(interval.high))


def _method(values: np.ndarray) -> str:
    """BCa, unless the values hardly differ beyond rounding: its acceleration is then 0/0."""
    spread = np.ptp(values)
    return "BCa" if spread > 1e-12 * np.abs(values).max() else "percentile"


def signs(tables: Tables) -> pd.DataFrame:
    """Each sign's mean over samples with its interval, one row per checkpoint, loop and sign.

    Args:
        tables: As in `per_sample`.

    Returns:
        model, step, loop, sign, mean, std (ddof = 1), low and high (95 % bootstrap interval of
        the mean), n (samples averaged), n_flagged (samples left out; none of a sign that has no
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
        for sign in SIGNS:
            values = part[sign.name].dropna().to_numpy(dtype=np.float64)
            n = len(values)
            measured = n > 0 or (sign.name == "loss" and key.model in with_loss)
            rows.append(
                {
                    **key._asdict(),
                    "sign": sign.name,
                    "mean": values.mean() if n else np.nan,
                    "std": values.std(ddof=1) if n > 1 else np.nan,
                    **bootstrap_mean(values)._asdict(),
                    "n": n,
                    "units": n,
                    "n_flagged": len(part) - n if measured else 0,
                }
            )
    return pd.DataFrame(rows).astype({"step": "Int64"})


class Difference(NamedTuple):
    """How the mean of one set of numbers differs from that of another.

    Attributes:
        mean: Of the differences (the first minus the second).
        low, high: 95 % bootstrap interval.
        effect_size: Cohen's d: the mean over the standard deviation, of the differences where they
            are paired (d_z), else pooled; NaN where nothing varies.
        p: Of a t-test, paired or Welch's; 1 where both are equal throughout.
        n: Pairs, or the smaller number of samples.
        paired: Whether both were measured on the same samples.
    """

    mean: float
    low: float
    high: float
    effect_size: float
    p: float
    n: int
    paired: bool


def paired_difference(a: pd.Series, b: pd.Series) -> Difference | None:
    """Difference of two signs on the same samples.

    Args:
        a: Values by sample number.
        b: The same; a sample that one of them lacks is left out.

    Returns:
        The difference a − b, or None below two pairs.
    """
    d = (a - b).dropna().to_numpy(dtype=np.float64)
    if len(d) < 2:
        return None
    low, high = bootstrap_mean(d)
    if np.ptp(d) <= 1e-12 * np.abs(d).max():  # nothing varies: no t-test
        p = float(d[0] == 0)
        return Difference(float(d.mean()), low, high, np.nan, p, len(d), True)
    p = float(stats.ttest_1samp(d, 0.0).pvalue)
    return Difference(float(d.mean()), low, high, float(d.mean() / d.std(ddof=1)), p, len(d), True)


def unpaired_difference(a: pd.Series, b: pd.Series) -> Difference | None:
    """Difference of two signs on different samples, as of models with different tokenizers.

    Args:
        a: Values of each sample.
        b: The same; other samples.

    Returns:
        The difference of the means, or None below two samples.
    """
    x, y = (s.dropna().to_numpy(dtype=np.float64) for s in (a, b))
    n = min(len(x), len(y))
    if n < 2:
        return None
    mean = float(x.mean() - y.mean())
    if np.ptp(x) == 0 and np.ptp(y) == 0:
        return Difference(mean, mean, mean, np.nan, float(mean == 0), n, False)
    interval = stats.bootstrap(
        (x, y), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=RESAMPLES,
        confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    pooled = np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    p = float(stats.ttest_ind(x, y, equal_var=False).pvalue)
    return Difference(mean, float(interval.low), float(interval.high), mean / pooled, p, n, False)


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
        sign, mean, low, high, effect_size, p, p_adjusted (Benjamini-Hochberg over all rows), n,
        paired, reason (why there is no difference; None where there is).
    """
    parts = {
        key: part.set_index("sample")
        for key, part in by_key(samples).items()
        if key.model not in skip
    }
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
                difference = (paired_difference if same_tokens else unpaired_difference)(a, b)
                reason = None if difference else "fewer than two samples have it in both"
            numbers = difference or Difference(nan, nan, nan, nan, nan, 0, same_tokens)
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
