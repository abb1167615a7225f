"""Statistics over samples: measured tables in, one row per cell of a figure out.

Every function takes one tidy table (one row per item and sample) and returns a data frame with the
columns `mean`, `std` (ddof = 1, over samples), `n` (values averaged) and `n_flagged` (values left
out). A value is left out, never averaged in, when its `flag` is set or it is not finite.
"""

import numpy as np
import pandas as pd

from loopscope.analysis.tables.registry import MEASURED
from loopscope.names import FEWEST_DOCUMENTS, KEYS

STRUCTURAL = ("short",)
"""Flags of rows that merely pad the table (no such singular value exists); they count nowhere."""


def sound(frame: pd.DataFrame, column: str = "value") -> pd.Series:
    """Tell which rows may be averaged: flag null and value finite.

    Args:
        frame: A measured table with the column `flag`.
        column: The column that holds the values.

    Returns:
        A boolean series on the table's index.
    """
    finite = np.isfinite(frame[column].to_numpy(dtype=np.float64))
    return frame["flag"].isna() & finite


def summarise(frame: pd.DataFrame, by: list[str], column: str = "value") -> pd.DataFrame:
    """Average a measured table over its samples.

    Args:
        frame: A measured table.
        by: Columns that name one cell, besides model, step and loop.
        column: The column to average.

    Returns:
        One row per (model, step, loop, *by) that occurs, in order of first appearance, with
        `mean`, `std` (ddof = 1; NaN below two values), `n` and `n_flagged`. A cell whose rows are
        all left out stays, with n = 0 and mean NaN.
    """
    keys = KEYS + by
    good = sound(frame, column)
    part = frame[keys].assign(_value=frame[column].astype(np.float64).where(good))
    groups = part.groupby(keys, observed=True, sort=False, dropna=False)["_value"]
    table = groups.agg(["mean", "std", "count", "size"]).reset_index()
    table["n_flagged"] = table["size"] - table["count"]
    return table.rename(columns={"count": "n"}).drop(columns="size")


def with_errors(frame: pd.DataFrame, by: list[str], column: str = "value") -> pd.DataFrame:
    """Average a measured table, with the standard error of each mean by document.

    Windows of one document are not independent: the error is cluster-robust, as that of
    `collapse.signs`; of fewer than 8 documents, or none known, each window counts by itself.

    Args:
        frame: A measured table.
        by: As in `summarise`.
        column: As in `summarise`.

    Returns:
        What `summarise` gives, with `error` (NaN below two clusters) and `clusters`.
    """
    keys = KEYS + by
    part = frame[[*keys, "sample", "document"]].assign(_v=frame[column].astype(np.float64))
    part = part[sound(frame, column)]
    part["_cluster"] = clusters(part)
    cells = part.groupby([*keys, "_cluster"], observed=True, sort=False, dropna=False)["_v"]
    sums = cells.agg(["sum", "count"]).reset_index()
    of_cell = sums.groupby(keys, observed=True, sort=False, dropna=False)
    n = of_cell["count"].transform("sum")
    sums["_r"] = (sums["sum"] - sums["count"] * of_cell["sum"].transform("sum") / n) ** 2
    totals = sums.groupby(keys, observed=True, sort=False, dropna=False)
    errors = totals.agg(_r=("_r", "sum"), _n=("count", "sum"), clusters=("_r", "size"))
    G = errors["clusters"].where(errors["clusters"] > 1)
    errors["error"] = np.sqrt(G / (G - 1) * errors["_r"]) / errors["_n"]
    table = summarise(frame, by, column)
    table = table.merge(errors[["error", "clusters"]].reset_index(), on=keys, how="left")
    return table.fillna({"clusters": 0})


def clusters(frame: pd.DataFrame) -> pd.Series:
    """Tell which rows are not independent of each other.

    Args:
        frame: A measured table.

    Returns:
        A label per row: its document, or its window where there are fewer than 8 documents, or none
        is known, model by model.
    """
    windows = "window " + frame["sample"].astype(str)
    known = frame["document"].notna()
    documents = frame["document"].astype(object).where(known, windows)
    by_model = frame["model"]
    enough = documents.groupby(by_model, observed=True).transform("nunique") >= FEWEST_DOCUMENTS
    enough &= known.groupby(by_model, observed=True).transform("any")
    return documents.where(enough, windows)


def means(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """Average a table over its samples, cell by cell of its figure.

    Of the spectrum the logarithm is averaged, because the mean minus the deviation of the ratio
    can fall below 0.

    Args:
        frame: The table, or some of its rows.
        table: Its name, for the columns that name a cell and the one that is averaged.

    Returns:
        model, step, loop, the table's key columns, mean, std, n, n_flagged. Rows that only pad a
        short spectrum do not appear.
    """
    record = MEASURED[table]
    exists = ~frame["flag"].isin(STRUCTURAL)
    return summarise(frame[exists], list(record.keys), record.averaged)


def routing(frame: pd.DataFrame) -> pd.DataFrame:
    """Average router weights and the alpha of MeSH Eq. 7 per model, step of the loop and target.

    Args:
        frame: `tables.routing`.

    Returns:
        model, step, loop, kind, t, target, mean, std, n, n_flagged and `entropy` (nats, mean over
        the same samples; NaN for alpha).
    """
    entropy = summarise(frame, list(MEASURED["routing"].keys), "entropy")
    return means(frame, "routing").assign(entropy=entropy["mean"])


def left_out(frame: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """Count samples, and the values and samples that no mean contains, per model.

    Args:
        frame: A measured table.
        column: The column that is averaged.

    Returns:
        model, step, loop, samples, flagged_values, flagged_samples (those with at least one
        flagged value), reasons (the flags met, `nonfinite` where a value has none).
    """
    exists = frame[~frame["flag"].isin(STRUCTURAL)]
    part = exists[[*KEYS, "sample"]].assign(_bad=~sound(exists, column))
    per_sample = part.groupby([*KEYS, "sample"], observed=True, sort=False, dropna=False)["_bad"]
    counts = per_sample.agg(flagged_values="sum").reset_index()
    counts["flagged_samples"] = counts["flagged_values"] > 0
    groups = counts.groupby(KEYS, observed=True, sort=False, dropna=False)
    table = groups.agg(
        samples=("sample", "nunique"),
        flagged_values=("flagged_values", "sum"),
        flagged_samples=("flagged_samples", "sum"),
    ).reset_index()
    flags = exists.loc[part["_bad"], [*KEYS, "flag"]].astype({"flag": object})
    flags["flag"] = flags["flag"].fillna("nonfinite")
    by_key = flags.drop_duplicates().groupby(KEYS, observed=True, sort=False, dropna=False)["flag"]
    reasons = by_key.agg(lambda f: ", ".join(sorted(f))).rename("reasons").reset_index()
    return table.merge(reasons, on=KEYS, how="left").fillna({"reasons": ""})
