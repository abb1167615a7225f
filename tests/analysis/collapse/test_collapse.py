"""Signs of collapse from small tables written by hand."""

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.collapse import SIGNS, per_sample, signs
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import SCHEMAS, schema
from loopscope.errors import InputError

K = 2


def frame(table: str, rows: list[dict]) -> pd.DataFrame:
    common = {"model": "a", "step": None, "document": None, "loop": "core", "flag": None}
    full = [{**common, **row} for row in rows]
    return pd.DataFrame(full, columns=list(schema(table))).astype(schema(table))


def tables(**changes) -> Tables:
    """Two samples: updates 3:1 and 1:1, CKA .9/.7 and .5/.5, ranks 8 → 4 and 10 → 20."""
    update, cka, rank, loss = [], [], [], []
    delta, readout, routing = [], [], []
    for sample, (cores, alike, ranks, nats) in enumerate(
        [((0.6, 0.2), (0.9, 0.7), (8.0, 4.0), 2.0), ((0.3, 0.3), (0.5, 0.5), (10.0, 20.0), 3.0)]
    ):
        for block, value in zip(("prelude", "core1", "core2"), (9.0, *cores), strict=True):
            t = -1 if block == "prelude" else int(block[-1]) - 1
            update.append({"sample": sample, "block": block, "t": t, "value": value})
        for state in ("h0", "h1", "h2"):
            itself = {"state_a": state, "state_b": state, "kernel": "rbf", "value": 1.0}
            cka.append({"sample": sample, **itself, "estimator": "biased"})
        ends = {"state_a": "h0", "state_b": "h2", "kernel": "rbf", "estimator": "debiased"}
        cka.append({"sample": sample, **ends, "value": 0.1 * sample})
        for t, value in enumerate(alike):
            for estimator, shift in (("biased", 0.0), ("debiased", -0.4)):
                pair = {"state_a": f"h{t}", "state_b": f"h{t + 1}", "kernel": "rbf"}
                cka.append(
                    {"sample": sample, **pair, "estimator": estimator, "value": value + shift}
                )
        low, high = ranks
        for state, value in (("h0", low), ("h1", np.sqrt(low * high)), ("h2", high)):
            rank.append({"sample": sample, "state": state, "measure": "effective", "value": value})
            rank.append({"sample": sample, "state": state, "measure": "stable", "value": 1.0})
        loss.append({"sample": sample, "value": nats})
    # means 6.5, 2.25, 2.25: h(1) is the first of the best states
    for sample, nats in enumerate([(5.0, 1.5, 2.0, 1.75), (8.0, 3.0, 2.5, 3.5)]):
        raw = {"sample": sample, "reading": "raw"}
        readout += [{**raw, "t": t, "value": x} for t, x in enumerate(nats)]
    # matched takes most off the raw gain of the loop, fitted that of the other loops
    for reading, losses in (
        ("matched", [(3.0, 1.0, 2.0), (6.5, 2.75, 2.5)]),
        ("fitted", [(4.0, 2.25, 2.0), (7.0, 3.5, 2.5)]),
    ):
        for sample, nats in enumerate(losses):
            kind = {"sample": sample, "reading": reading}
            readout += [{**kind, "t": t, "value": x} for t, x in enumerate(nats)]
    for sample, lengths in enumerate([(0.8, 0.4, 0.2), (0.4, 0.2, 0.4)]):
        before = np.nan
        for t, x in enumerate(lengths):
            step = {"sample": sample, "t": t, "value": x, "ratio": x / before}
            delta.append({**step, "mixed": x / 2, "turn": x * (t + 1), "work": x + t})
            before = x
        for t, source, alpha in (
            (0, "core1", 0.3), (1, "core1", -0.5), (1, "core2", 0.02 * sample), (1, "prelude", 9.0),
        ):  # fmt: skip
            read = {"kind": "alpha", "t": t, "target": source}
            routing.append({"sample": sample, **read, "mean": alpha})
    made = {"update": update, "cka": cka, "rank": rank, "loss": loss}
    made |= {"delta": delta, "readout": readout, "routing": routing}
    return Tables(**{name: frame(name, rows) for name, rows in made.items()}, **changes)


def test_signs_of_each_sample_follow_from_the_tables():
    found = per_sample(tables())
    expected = {
        "loss": [2.0, 3.0],
        "first_share": [0.75, 0.5],
        "skew": [0.5, 0.0],
        "mixed_update": [0.3, 0.15],
        "turn": [1.6, 0.8],  # 0.8 and 0.8, 0.4 and 0.4; the third step is beyond h(K)
        "work": [2.2, 1.6],
        "turn_skew": [0.0, 0.0],
        "read_most": [0.5, 0.5],
        "read_second": [0.0, 0.02],
        "cka_least": [0.0, 0.1],
        "cka_biased": [0.8, 0.5],
        "cka_debiased": [0.4, 0.1],
        "erank_0": [8.0, 10.0],
        "erank_K": [4.0, 20.0],
        "erank_ratio": [0.5, 2.0],
        "erank_slope": [np.log(0.5) / 2, np.log(2.0) / 2],
        "loop_gain": [1.0, 4.0],  # matched: 2.5 on average, raw 4.25, fitted 3.25
        "raw_gain": [3.0, 5.5],
        "matched_gain": [1.0, 4.0],
        "fitted_gain": [2.0, 4.5],
        "rest_gain": [-1.0, 0.25],  # matched; both loops turn alike, so b is the first
        "overthinking": [1.0, -0.25],  # matched at t = 1
        "erank_share": [np.nan, np.nan],  # without provenance
        "more_loss": [-0.25, 1.0],
        "delta_last": [0.4, 0.2],
        "step_ratio": [0.25, 1.0],
        "nonfinite": [0.0, 0.0],
    }
    names = ["model", "step", "loop", "sample", "document", *(s.name for s in SIGNS)]
    assert list(found.columns) == names
    assert {*expected} == {s.name for s in SIGNS}
    for sign, values in expected.items():
        np.testing.assert_allclose(found[sign], values, rtol=1e-12, err_msg=sign)


def test_means_and_deviations_are_over_samples():
    table = signs(tables()).set_index("sign")
    assert table.loc["erank_ratio", "mean"] == pytest.approx(1.25)
    assert table.loc["erank_ratio", "std"] == pytest.approx(np.std([0.5, 2.0], ddof=1))
    known = table.drop("erank_share")  # there is no provenance to tell the width
    assert (known["n"] == 2).all() and (table["n_flagged"] == 0).all()


def test_flagged_samples_are_counted_and_left_out():
    given = tables()
    rank = given.rank.copy()
    rank["flag"] = rank["flag"].cat.add_categories("shape")
    rank.loc[rank["state"].eq("h2") & rank["sample"].eq(1), ["flag", "value"]] = ("shape", 999.0)
    given.rank = rank
    table = signs(given).set_index("sign")
    assert table.loc["erank_ratio", "mean"] == pytest.approx(0.5)
    assert (table.loc["erank_ratio", "n"], table.loc["erank_ratio", "n_flagged"]) == (1, 1)
    assert table.loc["erank_0", "n"] == 2


def test_values_that_are_not_finite_are_counted_up_to_the_last_state():
    given = tables()
    for t, share in ((2, 0.0), (1, 0.5)):  # t = 2 is the step after h(K)
        delta = given.delta.copy()
        delta["flag"] = delta["flag"].astype(object)
        delta.loc[delta["t"].eq(t) & delta["sample"].eq(1), ["flag", "value"]] = (
            "nonfinite",
            np.nan,
        )
        given.delta = delta.astype(schema("delta"))
        assert signs(given).set_index("sign").loc["nonfinite", "mean"] == share


def test_a_missing_table_is_named():
    given = tables()
    given.cka = None
    with pytest.raises(InputError, match="need cka, which was not measured"):
        signs(given)
    assert set(SCHEMAS) >= {"update", "cka", "rank"}


def test_without_their_tables_signs_are_unknown():
    given = tables()
    given.loss = given.readout = given.delta = given.routing = None
    table = signs(given).set_index("sign")
    kept = {"skew", "first_share", "cka_debiased", "cka_biased", "cka_least", "erank_0", "erank_K",
            "erank_ratio", "erank_slope", "nonfinite"}  # fmt: skip
    assert {name for name, n in table["n"].items() if n} == kept


def test_the_rank_is_held_against_the_directions_that_there_are():
    record = {"config": {"d_model": 64}, "samples": {"tokens": 44}, "options": {"drop_first": 4}}
    found = per_sample(tables(provenance={"models": {"a": record}}))
    assert found["erank_share"].tolist() == [4.0 / 40, 20.0 / 40]


def without_a_start(state: str = "h0") -> Tables:
    """The same, h(0) without spread: its CKA is undefined, its rank too, its step has no base."""
    given = tables()
    for name in ("cka", "rank", "delta"):
        rows = getattr(given, name).astype({"flag": object})
        gone = rows["t"].eq(0) if name == "delta" else (
            rows["state_a"].eq(state) if name == "cka" else rows["state"].eq(state)
        )  # fmt: skip
        columns = [c for c in ("value", "turn", "work") if c in rows]
        rows.loc[gone, ["flag", *columns]] = ["zero", *[np.nan] * len(columns)]
        setattr(given, name, rows.astype(schema(name)))
    return given


def test_a_loop_that_ends_at_nothing_has_no_direction_left():
    found = per_sample(without_a_start("h2"))
    assert found["erank_K"].tolist() == [0.0, 0.0] == found["erank_ratio"].tolist()
    assert found["cka_debiased"].notna().all() and found["nonfinite"].tolist() == [0.0, 0.0]


def test_what_is_defined_counts_where_the_first_state_has_no_spread():
    found = per_sample(without_a_start())
    assert found["nonfinite"].tolist() == [0.0, 0.0]  # undefined is not infinite
    np.testing.assert_allclose(found["cka_debiased"], [0.3, 0.1])  # of h(1) and h(2)
    ratio = [4.0 / np.sqrt(32.0), 20.0 / np.sqrt(200.0)]
    np.testing.assert_allclose(found["erank_ratio"], ratio)
    np.testing.assert_allclose(found["erank_slope"], np.log(ratio))
    # out of a state without direction tokens turn as far as to an orthogonal one
    np.testing.assert_allclose(found["turn"], [2**0.5 + 0.8, 2**0.5 + 0.4])
    np.testing.assert_allclose(found["work"], [2**0.5 + 1.4, 2**0.5 + 1.2])


def test_steps_of_a_series_are_told_apart_and_sorted():
    late, early = tables(), tables()
    for name in late.frames():
        for one, step in ((late, 200), (early, 30)):
            rows = getattr(one, name)
            steps = pd.array([step] * len(rows), dtype="Int64")
            setattr(one, name, rows.assign(step=steps))
    found = per_sample(Tables.join([late, early]))
    assert found["step"].tolist() == [30, 30, 200, 200] and set(found["model"]) == {"a"}
    np.testing.assert_allclose(found["skew"], [0.5, 0.0, 0.5, 0.0])


def two_loops() -> Tables:
    """Model a with loops H and L, L's updates the other way round; its loss stands with H."""
    given = tables()
    for name in ("update", "cka", "rank"):
        outer = getattr(given, name).assign(loop="H")
        inner = outer.assign(loop="L")
        if name == "update":
            swapped = {"core1": "core2", "core2": "core1"}
            inner["block"] = inner["block"].astype(str).replace(swapped)
        both = pd.concat([outer, inner], ignore_index=True)
        setattr(given, name, both.astype(schema(name)))
    given.loss = given.loss.assign(loop=pd.Categorical(["H", "H"]))
    return given


def test_each_loop_has_rows_and_all_have_the_models_loss():
    found = per_sample(two_loops())
    assert found["loop"].tolist() == ["H", "H", "L", "L"] and set(found["model"]) == {"a"}
    assert found["loss"].tolist() == [2.0, 3.0, 2.0, 3.0]
    np.testing.assert_allclose(found["first_share"], [0.75, 0.5, 0.25, 0.5])
    assert found["loop_gain"].isna().all()  # its rows stand with a loop of another name
    assert signs(two_loops())["loop"].unique().tolist() == ["H", "L"]


@pytest.mark.parametrize("flagged", [False, True])
def test_a_loss_that_is_flagged_throughout_is_counted_one_not_measured_is_not(flagged):
    given = tables()
    if flagged:
        given.loss = given.loss.assign(value=np.nan, flag=pd.Categorical(["nonfinite"] * 2))
    else:
        given.loss = given.loss.iloc[:0].astype({"model": str}).astype(schema("loss"))
    row = signs(given).set_index("sign").loc["loss"]
    assert (row["n"], row["n_flagged"]) == (0, 2 if flagged else 0)
