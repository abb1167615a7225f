"""Statistics over seeds of training runs: the table `training` in, one row per drawn point out.

Runs with the same `recipe` differ in nothing but their seed. Those that came to their end are
averaged; one that did not is never averaged in.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from loopscope.models.native import LoopConfig

_SEEDS = ("seed", "data_seed")
_BESIDES = ("device", "accumulate", "compile", "log_every", "eval_every")
"""Settings of a recipe that do not change what is learned."""


def recipe(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what a run learns, but for its seed: the model, the recipe, the text.

    Args:
        origin: A `provenance.json` or `run.json` of a run.

    Returns:
        Setting → value, those of the model as `model.…`; equal for runs that may be averaged.
    """
    training, data = origin["training"], origin.get("data") or {}
    kept = {k: v for k, v in training.items() if k not in ("model", *_SEEDS, *_BESIDES)}
    model = LoopConfig.from_dict(training["model"]).to_dict()
    text = {"data": data.get("sha256"), "heldout_share": data.get("heldout_share")}
    return {**{f"model.{k}": v for k, v in model.items()}, **kept, **text}


def progress(training: pd.DataFrame) -> pd.DataFrame:
    """Tell how far each run came.

    Args:
        training: `tables.training`.

    Returns:
        One row per run, in the table's order: `model`, `recipe`, `step` (the last logged),
        `steps_planned`, `validated` (whether it has any validation loss) and `finished` (whether
        the last step planned is there with its validation loss).
    """
    rows = _named(training)
    rows["validated"] = rows["val_loss"].notna()
    rows["finished"] = rows["validated"] & rows["step"].eq(rows["steps_planned"])
    runs = rows.groupby("model", sort=False)
    per_run = runs.agg(
        recipe=("recipe", "first"),
        step=("step", "max"),
        steps_planned=("steps_planned", "first"),
        validated=("validated", "any"),
        finished=("finished", "any"),
    )
    return per_run.reset_index()


def validation(training: pd.DataFrame) -> pd.DataFrame:
    """Average the validation loss of the finished runs over seeds.

    Args:
        training: `tables.training`.

    Returns:
        Columns `recipe`, `step`, `tokens`, `mean`, `low`, `high` (nats per token; least and
        greatest of the seeds) and `n` (runs averaged). A recipe has the steps at which all its
        finished runs have a validation loss, so `n` is the same along a line.
    """
    rows = _validated(training, finished=True)
    points = rows.groupby(["recipe", "step", "tokens"], sort=False)["val_loss"]
    stats = points.agg(mean="mean", low="min", high="max", n="count").reset_index()
    runs = rows.groupby("recipe")["model"].nunique()
    return stats[stats["n"].eq(stats["recipe"].map(runs))].reset_index(drop=True)


def unfinished(training: pd.DataFrame) -> pd.DataFrame:
    """Select the validation losses of the runs that did not come to their end.

    Args:
        training: `tables.training`.

    Returns:
        Columns `recipe`, `model`, `step`, `steps_planned`, `tokens`, `val_loss`.
    """
    rows = _validated(training, finished=False)
    kept = ["recipe", "model", "step", "steps_planned", "tokens", "val_loss"]
    return rows[kept].reset_index(drop=True)


def final_perplexity(training: pd.DataFrame) -> pd.DataFrame:
    """Average the perplexity exp(validation loss) at the end of training over seeds.

    Args:
        training: `tables.training`.

    Returns:
        One row per recipe that has a finished run: `recipe`, `params` (non-embedding), `mean`,
        `low`, `high` (of the perplexities) and `n` (finished runs).
    """
    rows = _validated(training, finished=True)
    ends = rows[rows["step"].eq(rows["steps_planned"])]
    recipes = ends.assign(perplexity=np.exp(ends["val_loss"])).groupby("recipe", sort=False)
    stats = recipes.agg(
        params=("params_non_embedding", "first"),
        mean=("perplexity", "mean"),
        low=("perplexity", "min"),
        high=("perplexity", "max"),
        n=("perplexity", "count"),
    )
    return stats.reset_index()


def _named(training: pd.DataFrame) -> pd.DataFrame:
    """With strings for categories: those that do not occur must not become empty groups."""
    return training.astype({"model": object, "recipe": object})


def _validated(training: pd.DataFrame, *, finished: bool) -> pd.DataFrame:
    """Rows with a validation loss, of the runs that are finished or of the others."""
    runs, rows = progress(training), _named(training)
    models = runs["model"][runs["finished"].eq(finished)]
    return rows[rows["val_loss"].notna() & rows["model"].isin(models)]
