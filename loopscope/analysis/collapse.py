"""Signs of loop collapse, one row per checkpoint and loop: tables → table (needs no torch).

Small steps or a high CKA alone are no failure: a model trained to converge has both. So the loss
stands beside them.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from loopscope.analysis.aggregate import sound
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError

NEEDED = ("update", "cka", "rank")


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One measure of the table.

    Attributes:
        name: Column of the table.
        title: How it is shown.
        short: A heading for narrow tables.
        meaning: What it says, in one sentence.
    """

    name: str
    title: str
    short: str
    meaning: str


SIGNS = (
    Sign(
        name="loss",
        title="loss (nats/token)",
        short="loss",
        meaning="mean next-token cross-entropy, nats per token",
    ),
    Sign(
        name="first_share",
        title="share of the first loop",
        short="1st loop",
        meaning="relative update of the 1st core over the sum of all core iterations; 1/K if even",
    ),
    Sign(
        name="cka_biased",
        title="CKA of consecutive states",
        short="CKA",
        meaning="RBF-CKA of h(t) and h(t+1), mean over the loop; 1 where states stop changing",
    ),
    Sign(
        name="cka_debiased",
        title="CKA, debiased",
        short="CKA deb.",
        meaning="the same by HSIC_1, which does not grow with the width",
    ),
    Sign(
        name="erank_0",
        title="effective rank of h(0)",
        short="rank h(0)",
        meaning="effective rank, exp(entropy of σ/Σσ), of the state entering the loop",
    ),
    Sign(
        name="erank_K",
        title="effective rank of h(K)",
        short="rank h(K)",
        meaning="effective rank of the state leaving the loop",
    ),
    Sign(
        name="erank_ratio",
        title="effective rank, h(K) over h(0)",
        short="ratio",
        meaning="rank h(K) over rank h(0), per sample; below 1 where the loop loses dimensions",
    ),
)


def per_sample(tables: Tables) -> pd.DataFrame:
    """The signs of every sample.

    Args:
        tables: Needs update, cka and rank; loss where it was measured.

    Returns:
        Columns model, sample and one per sign; NaN where a flagged value would enter, or where a
        model has no iterations. A model with several loops stands there once for each, as
        `model, loop`; its loss is the same in all.

    Raises:
        InputError: if a table is missing.
    """
    frames = tables.frames()
    missing = [name for name in NEEDED if name not in frames]
    if missing:
        raise InputError(
            f"the table of signs needs {', '.join(missing)}, which was not measured; measure with "
            f"{', '.join(NEEDED)}."
        )
    found = [_of_loop(frames, *case) for case in _cases(tables)]
    return pd.concat(found, ignore_index=True)


def _cases(tables: Tables) -> list[tuple[str, str, str]]:
    """Model, loop, and what their row is called."""
    assert tables.rank is not None
    pairs = tables.rank[["model", "loop"]].drop_duplicates().astype(str)
    cases = []
    for model in tables.models:
        loops = pairs["loop"][pairs["model"].eq(model)].tolist()
        cases += [(model, loop, model if len(loops) == 1 else f"{model}, {loop}") for loop in loops]
    return cases


def _wide(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row per sample, one column per item, flagged values NaN."""
    values = frame.assign(value=frame["value"].where(sound(frame)))
    for column in columns:
        values[column] = values[column].astype(str)
    return values.pivot(index="sample", columns=columns, values="value")


def _of_loop(frames: dict[str, pd.DataFrame], model: str, loop: str, name: str) -> pd.DataFrame:
    own = {table: frame[frame["model"].eq(model)] for table, frame in frames.items()}
    own |= {table: own[table][own[table]["loop"].eq(loop)] for table in NEEDED}
    out = pd.DataFrame(index=pd.Index(sorted(own["rank"]["sample"].unique()), name="sample"))
    update = _wide(own["update"], ["block"])
    cores = [c for c in update.columns if str(c).startswith("core")]
    K = len(cores)
    if "loss" in own and len(own["loss"]):
        loss = own["loss"]
        out["loss"] = loss.assign(v=loss["value"].where(sound(loss))).set_index("sample")["v"]
    else:
        out["loss"] = np.nan
    nothing = pd.Series(np.nan, index=out.index)
    total = update[cores].sum(axis=1, skipna=False) if K else nothing
    out["first_share"] = update["core1"] / total.where(total > 0) if K else nothing
    rbf = own["cka"][own["cka"]["kernel"].eq("rbf")]
    for estimator in ("biased", "debiased"):
        part = rbf[rbf["estimator"].eq(estimator)]
        wide = _wide(part, ["state_a", "state_b"]) if len(part) else pd.DataFrame()
        pairs = [(f"h{t}", f"h{t + 1}") for t in range(K)]
        there = K > 0 and all(pair in wide.columns for pair in pairs)
        out[f"cka_{estimator}"] = wide[pairs].mean(axis=1, skipna=False) if there else nothing
    rank = own["rank"][own["rank"]["measure"].eq("effective")]
    erank = _wide(rank, ["state"])
    out["erank_0"], out["erank_K"] = erank["h0"], erank[f"h{K}"]
    out["erank_ratio"] = out["erank_K"] / out["erank_0"] if K else nothing
    return out.reset_index().assign(model=name)[["model", "sample", *(s.name for s in SIGNS)]]


def signs(tables: Tables) -> pd.DataFrame:
    """Mean and standard deviation over samples of each sign, one row per model, loop and sign.

    Args:
        tables: Needs update, cka and rank; loss where it was measured.

    Returns:
        model (`model, loop` where it has several), sign, mean, std (ddof = 1), n (samples
        averaged), n_flagged (samples left out; none of a loss that was not measured); models and
        signs in order.
    """
    values = per_sample(tables)
    cases = _cases(tables)
    long = values.melt(id_vars=["model", "sample"], var_name="sign", value_name="value")
    for column, order in (
        ("model", [name for *_, name in cases]),
        ("sign", [s.name for s in SIGNS]),
    ):
        long[column] = pd.Categorical(long[column], categories=order, ordered=True)
    groups = long.groupby(["model", "sign"], observed=True)["value"]
    table = groups.agg(["mean", "std", "count", "size"]).reset_index()
    table["n_flagged"] = table["size"] - table["count"]
    loss = tables.loss
    known = set() if loss is None else set(loss["model"].astype(str))
    unknown = [name for model, _, name in cases if model not in known]
    table.loc[table["sign"].eq("loss") & table["model"].isin(unknown), "n_flagged"] = 0
    return table.rename(columns={"count": "n"}).drop(columns="size")
