"""Statistics over seeds of training runs: the table `training` in, one row per drawn point out.

Runs with the same `recipe` differ in nothing but their seed and are averaged. Only runs that came
to their end count where there is one; while all of a recipe's runs are unfinished, they all do.
"""

import numpy as np
import pandas as pd


def progress(training: pd.DataFrame) -> pd.DataFrame:
    """Tell how far each run came.

    Args:
        training: `tables.training`.

    Returns:
        One row per run, indexed by `model`, in the table's order: `recipe`, `step` and
        `steps_planned`; `finished`: whether the last step planned is there with its validation
        loss; `validated`: whether there is any validation loss; `counted`: whether the run is
        among those that are averaged.
    """
    runs = training.assign(model=training["model"].astype(str), recipe=_recipe(training))
    runs["validated"] = runs["val_loss"].notna()
    runs["finished"] = runs["validated"] & runs["step"].eq(runs["steps_planned"])
    told = runs.groupby("model", sort=False).agg(
        recipe=("recipe", "first"),
        step=("step", "max"),
        steps_planned=("steps_planned", "first"),
        finished=("finished", "any"),
        validated=("validated", "any"),
    )
    some_finished = told.groupby("recipe")["finished"].transform("any")
    told["counted"] = told["finished"] | (told["validated"] & ~some_finished)
    return told


def validation(training: pd.DataFrame) -> pd.DataFrame:
    """Average the validation loss over seeds.

    Args:
        training: `tables.training`.

    Returns:
        Columns `recipe`, `step`, `tokens`, `mean`, `low`, `high` (nats per token, least and
        greatest of the seeds) and `n`: runs averaged. A recipe has those steps at which all of
        its counted runs have a validation loss, so `n` is the same along a line.
    """
    told = progress(training)
    rows = training.assign(model=training["model"].astype(str), recipe=_recipe(training))
    rows = rows[rows["val_loss"].notna() & rows["model"].isin(told.index[told["counted"]])]
    points = rows.groupby(["recipe", "step", "tokens"], sort=False)["val_loss"]
    stats = points.agg(mean="mean", low="min", high="max", n="count").reset_index()
    runs = rows.groupby("recipe")["model"].nunique()
    return stats[stats["n"].eq(stats["recipe"].map(runs))].reset_index(drop=True)


def final_perplexity(training: pd.DataFrame) -> pd.DataFrame:
    """Average the perplexity exp(validation loss) at the end of training over seeds.

    Args:
        training: `tables.training`.

    Returns:
        One row per recipe that has a finished run: `recipe`, `params` (non-embedding), `mean`,
        `low`, `high` of the perplexities, and `n`: finished runs.
    """
    told = progress(training)
    rows = training.assign(model=training["model"].astype(str), recipe=_recipe(training))
    ends = rows[rows["step"].eq(rows["steps_planned"])]
    ends = ends[ends["model"].isin(told.index[told["finished"]])]
    ends = ends.assign(perplexity=np.exp(ends["val_loss"]))
    recipes = ends.groupby("recipe", sort=False)
    return recipes.agg(
        params=("params_non_embedding", "first"),
        mean=("perplexity", "mean"),
        low=("perplexity", "min"),
        high=("perplexity", "max"),
        n=("perplexity", "count"),
    ).reset_index()


def _recipe(training: pd.DataFrame) -> pd.Series:
    return training["recipe"].astype(str)
