"""The signs of every sample: tables → one row per checkpoint, loop and sample."""

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from loopscope.analysis.collapse.criteria import SIGNS
from loopscope.analysis.tables import Tables, model_record, sound
from loopscope.errors import InputError
from loopscope.names import KEYS, block_number, block_order, state_name, state_names

NEEDED = ("update", "cka", "rank")
NAMES = [sign.name for sign in SIGNS]


def per_sample(tables: Tables) -> pd.DataFrame:
    """The signs of every sample.

    Args:
        tables: Needs update, cka and rank; delta, readout and loss where they were measured.

    Returns:
        Columns model, step, loop, sample, document (null where unknown) and one per sign (`SIGNS`);
        NaN where a flagged value would enter, or where a model has no iterations. A model with
        several loops has rows for each; what the readout gives stands with the main loop, the
        loss with all.

    Raises:
        InputError: if a table is missing.
    """
    frames = tables.frames()
    missing = [name for name in NEEDED if name not in frames]
    if missing:
        raise InputError(
            f"the signs of collapse need {', '.join(missing)}, which was not measured; measure "
            f"with {', '.join(NEEDED)}."
        )
    parts = {name: _parts(frame) for name, frame in frames.items() if name in _USED}
    records = {name: model_record(tables.provenance, name) for name in tables.models}
    rows = [
        _of_loop(parts, key, records[key.model].directions(key.loop)) for key in checkpoints(tables)
    ]
    dtypes = {"step": "Int64", "sample": "int32", "document": "category"}
    return pd.concat(rows, ignore_index=True).astype(dtypes)


_USED = ("update", "cka", "rank", "routing", "delta", "readout", "loss")


class Key(NamedTuple):
    """A checkpoint and loop: the step is None outside a series."""

    model: str
    step: int | None
    loop: str

    @classmethod
    def of(cls, row: Any) -> "Key":
        """Read a row's key.

        Args:
            row: Its model, step (perhaps null) and loop.

        Returns:
            The key.
        """
        model, step, loop = row
        return cls(str(model), None if pd.isna(step) else int(step), str(loop))


def checkpoints(tables: Tables) -> list[Key]:
    """List the checkpoints and loops that were measured.

    Args:
        tables: With the table rank.

    Returns:
        Each once; models and loops in order, steps sorted.
    """
    assert tables.rank is not None
    pairs = tables.rank[KEYS].astype({"model": object, "loop": object}).drop_duplicates()
    keys = [Key.of(row) for row in pairs.itertuples(index=False, name=None)]
    models = {name: i for i, name in enumerate(tables.models)}
    loops = {name: i for i, name in enumerate(dict.fromkeys(key.loop for key in keys))}
    return sorted(keys, key=lambda k: (models[k.model], loops[k.loop], k.step or 0))


def by_key(table: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """Group the rows of a table by checkpoint and loop.

    Args:
        table: With the columns model, step and loop.

    Returns:
        Rows by key, in order of first appearance.
    """
    groups: Any = table.groupby(KEYS, sort=False, dropna=False, observed=True)
    return {Key.of(key): rows for key, rows in groups}


def _parts(frame: pd.DataFrame) -> dict[tuple[str, int | None], pd.DataFrame]:
    """The rows of each checkpoint."""
    groups: Any = frame.groupby(["model", "step"], observed=True, dropna=False)
    return {Key.of((*key, ""))[:2]: rows for key, rows in groups}


def _wide(frame: pd.DataFrame, columns: list[str], value: str = "value") -> pd.DataFrame:
    """One row per sample, one column per item, flagged values NaN."""
    values = frame.assign(_v=frame[value].where(sound(frame, value)))
    for column in columns:
        values[column] = values[column].astype(str if column != "t" else int)
    return values.pivot(index="sample", columns=columns, values="_v")


def without_spread(cka: pd.DataFrame | None, K: int) -> int:
    """Count the states at the start of a loop that have no spread: zero, or constant.

    Args:
        cka: The rows of one checkpoint and loop in the table `cka`; None where it was not measured.
        K: Iterations of the loop.

    Returns:
        t of the first state whose tokens differ in nine samples of ten; 0 where none do.
    """
    if cka is None:
        return 0
    itself = cka[cka["state_a"].astype(str).eq(cka["state_b"].astype(str))]
    constant = itself["flag"].eq("zero").groupby(itself["state_a"].astype(str)).mean()
    spread = [t for t, name in enumerate(state_names(K)) if constant.get(name, 0) <= MOST_CONSTANT]
    return spread[0] if spread else 0


MOST_CONSTANT = 0.1
"""A state that is constant in more of the samples than this has no spread."""


def _of_loop(parts: dict[str, dict], key: Key, limit: float) -> pd.DataFrame:
    """The signs of every sample of one checkpoint and loop, from the rows of each checkpoint."""
    checkpoint = {name: groups.get(key[:2]) for name, groups in parts.items()}

    def rows_of(table: str, *, any_loop: bool = False) -> pd.DataFrame | None:
        frame = checkpoint.get(table)
        if frame is None:
            return None
        rows = frame if any_loop else frame[frame["loop"].eq(key.loop)]
        return rows if len(rows) else None

    update, delta, rank = rows_of("update"), rows_of("delta"), rows_of("rank")
    loss, cka = rows_of("loss", any_loop=True), rows_of("cka")
    assert rank is not None
    out = pd.DataFrame(
        np.nan, index=pd.Index(sorted(rank["sample"].unique()), name="sample"), columns=NAMES
    )
    _fill_loss(out, loss)
    busiest, K = _fill_shares(out, update)
    first = without_spread(cka, K)
    if K:
        _fill_likeness(out, cka, range(first, K + 1))
        busiest = _fill_turns(out, delta, K, otherwise=busiest)
    _fill_ranks(out, rank, K, first)
    _fill_reads(out, rows_of("routing"))
    out["erank_share"] = out["erank_K"] / limit
    _fill_readout(out, rows_of("readout"), K, busiest)
    _fill_steps(out, delta, K)
    _fill_nonfinite(out, [update, delta, loss, rank], K)
    step: Any = pd.NA if key.step is None else key.step
    documents = rank.drop_duplicates("sample").set_index("sample")["document"].astype(object)
    rows = out.reset_index().assign(model=key.model, step=step, loop=key.loop)
    rows["document"] = documents.reindex(out.index).to_numpy()
    return rows[[*KEYS, "sample", "document", *NAMES]]


def _fill_loss(out: pd.DataFrame, loss: pd.DataFrame | None) -> None:
    if loss is not None:
        out["loss"] = loss.assign(v=loss["value"].where(sound(loss))).set_index("sample")["v"]


def _fill_shares(out: pd.DataFrame, update: pd.DataFrame | None) -> tuple[int, int]:
    """Skew and share of the first loop; the busiest loop's number and K."""
    if update is None:
        return 0, 0
    wide = _wide(update, ["block"])
    cores = [c for c in block_order(map(str, wide.columns)) if block_number(c) is not None]
    K = len(cores)
    if not K:
        return 0, 0
    shares = _shares(wide[cores])
    out["first_share"] = shares[cores[0]]
    if K > 1:
        out["skew"] = _excess(shares)
    return _largest(shares), K


def _shares(work: pd.DataFrame) -> pd.DataFrame:
    """Each loop's part of the work of all, by sample."""
    total = work.sum(axis=1, skipna=False)
    return work.div(total.where(total > 0), axis=0)


def _excess(shares: pd.DataFrame) -> pd.Series:
    """What the busiest loop has beyond an even share: 0 where all are even, 1 where it has all."""
    K = shares.shape[1]
    return (shares.max(axis=1, skipna=False) - 1 / K) / (1 - 1 / K)


def _largest(shares: pd.DataFrame) -> int:
    means = shares.mean()
    return int(np.argmax(means.to_numpy())) if means.notna().any() else 0


def _fill_turns(out: pd.DataFrame, delta: pd.DataFrame | None, K: int, *, otherwise: int) -> int:
    """Steps of the mixed state, with and without growth; the number of the loop that turns most."""
    if delta is None:
        return otherwise
    within = delta[delta["t"] < K]
    if not within["turn"].notna().any():  # a table of an earlier loopscope has none
        return otherwise
    # to or from a state without direction: as far as to an orthogonal one
    undirected = within["turn"].isna() & ~within["flag"].isin(["nonfinite", "shape"])
    turn = within["turn"].mask(undirected, 2**0.5)
    work = within["work"].mask(undirected & within["work"].isna(), 2**0.5)
    within = within.assign(turn=turn, work=work)
    mixed, turns, works = (
        within.pivot(index="sample", columns="t", values=name) for name in ("mixed", "turn", "work")
    )
    out["mixed_update"] = mixed.mean(axis=1, skipna=False)
    out["turn"], out["work"] = turns.sum(axis=1, skipna=False), works.sum(axis=1, skipna=False)
    shares = _shares(turns)
    if K > 1:
        out["turn_skew"] = _excess(shares)
    return _largest(shares) if shares.notna().any(axis=None) else otherwise


def _fill_likeness(out: pd.DataFrame, cka: pd.DataFrame | None, states: range) -> None:
    """CKA of consecutive states, by both estimators, and the least debiased one of any two."""
    if cka is None:
        return
    rbf = cka[cka["kernel"].eq("rbf")]
    names = [state_name(t) for t in states]
    pairs = list(pairwise(names))
    for estimator in ("biased", "debiased"):
        part = rbf[rbf["estimator"].eq(estimator)]
        wide = _wide(part, ["state_a", "state_b"]) if len(part) else pd.DataFrame()
        if pairs and all(pair in wide.columns for pair in pairs):
            out[f"cka_{estimator}"] = _defined(wide[pairs]).mean(axis=1, skipna=False)
            every = list(combinations(names, 2))
            if estimator == "debiased" and all(pair in wide.columns for pair in every):
                out["cka_least"] = _defined(wide[every]).min(axis=1, skipna=False)


def _defined(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of states that have a CKA in nine samples of ten; all where none has."""
    kept = pairs.columns[pairs.isna().mean() <= MOST_CONSTANT]
    return pairs[kept] if len(kept) else pairs


def _fill_ranks(out: pd.DataFrame, rank: pd.DataFrame, K: int, first: int) -> None:
    """Effective ranks of h(0) and h(K), their ratio, and the slope in between."""
    effective = rank[rank["measure"].eq("effective")]
    erank = _wide(effective, ["state"])
    out["erank_0"], out["erank_K"] = erank[state_name(0)], erank[state_name(K)]
    last = effective[effective["state"].eq(state_name(K)) & effective["flag"].eq("zero")]
    out.loc[out.index.isin(last["sample"]), "erank_K"] = 0.0  # a zero state has no direction
    states = [state_name(t) for t in range(first, K + 1)]
    if len(states) < 2 or not all(state in erank.columns for state in states):
        return
    out["erank_ratio"] = out["erank_K"] / erank[states[0]]
    t = np.arange(len(states)) - (len(states) - 1) / 2
    out["erank_slope"] = np.log(erank[states]) @ t / (t @ t)


def _fill_reads(out: pd.DataFrame, routing: pd.DataFrame | None) -> None:
    """How much of what the iterations write to a memory is read: the most, and the second most."""
    if routing is None:
        return
    alpha = routing[routing["kind"].eq("alpha")]
    cores = alpha[[block_number(str(name)) is not None for name in alpha["target"]]]
    if cores.empty:
        return
    sizes = cores["mean"].where(sound(cores, "mean")).abs()
    read = cores.assign(v=sizes, j=cores["target"].astype(str))
    most = read.groupby(["sample", "j"])["v"].max().unstack()
    out["read_most"] = most.max(axis=1, skipna=False)
    if most.shape[1] > 1:
        second = np.sort(most.to_numpy(), axis=1)[:, -2]
        out["read_second"] = pd.Series(second, most.index).where(most.notna().all(axis=1))


def _fill_readout(out: pd.DataFrame, readout: pd.DataFrame | None, K: int, busiest: int) -> None:
    """What the loop, and the loops besides the busiest, do for the loss of a coda lens.

    Of several readings that counts which flatters the loop least, on average over the samples.
    """
    if readout is None or not K:
        return
    readings = {
        str(name): _wide(rows, ["t"])  # L(t) by sample and t
        for name, rows in readout.groupby("reading", observed=True, sort=False)
    }
    gains, others, harms = [], [], []
    for name, L in readings.items():
        within = L[list(range(K + 1))]
        gain = L[0] - L[K]
        out[f"{name}_gain"] = gain
        gains.append(gain)
        others.append(gain - (L[busiest] - L[busiest + 1]))
        means = within.dropna().mean()
        # a map shrinks what it is not sure of, h(K) is left as it is: no harm is read off that
        if name != "fitted" and means.notna().all():
            harms.append(L[K] - L[int(np.argmin(means.to_numpy()))])
    out["loop_gain"] = _with_mean(gains, min)
    if K > 1:
        out["rest_gain"] = _with_mean(others, min)
    if harms:
        out["overthinking"] = _with_mean(harms, max)
    raw = readings.get("raw")
    if raw is not None and (T := max(int(t) for t in raw.columns)) > K:
        out["more_loss"] = raw[T] - raw[K]


def _with_mean(values: list[pd.Series], choose: Callable[..., Any]) -> pd.Series:
    """The one of several signs whose mean is least, or largest; one without values is not taken."""
    filled = [of_reading for of_reading in values if of_reading.notna().any()] or values[:1]
    chosen: pd.Series = choose(filled, key=lambda of_reading: of_reading.mean())
    return chosen


def _fill_steps(out: pd.DataFrame, delta: pd.DataFrame | None, K: int) -> None:
    """Length of the last step, and over the first."""
    if delta is None or not K:
        return
    out["delta_last"] = _wide(delta, ["t"])[K - 1]
    later = delta[delta["t"] > 0]
    if len(later):
        # the ratios of consecutive steps telescope
        out["step_ratio"] = _wide(later, ["t"], "ratio").prod(axis=1, skipna=False)


def _fill_nonfinite(out: pd.DataFrame, frames: list[pd.DataFrame | None], K: int) -> None:
    """Which samples have values that are not finite, up to h(K)."""
    out["nonfinite"] = 0.0
    for frame in frames:
        if frame is None:
            continue
        within = frame[frame["t"] < K] if "t" in frame and K else frame
        bad = within["sample"][within["flag"].eq("nonfinite")]
        out.loc[out.index.isin(bad), "nonfinite"] = 1.0
