"""Signs of collapse from small tables written by hand."""

import numpy as np
import pandas as pd
import pytest

from loopscope.analysis.collapse import SIGNS, per_sample, signs
from loopscope.analysis.tables import SCHEMAS, Tables, schema
from loopscope.errors import InputError

K = 2


def frame(table: str, rows: list[dict]) -> pd.DataFrame:
    full = [{"model": "a", "step": None, "loop": "core", "flag": None, **row} for row in rows]
    return pd.DataFrame(full, columns=list(schema(table))).astype(schema(table))


def tables(**changes) -> Tables:
    """Two samples: updates 3:1 and 1:1, CKA .9/.7 and .5/.5, ranks 8 → 4 and 10 → 20."""
    update, cka, rank, loss = [], [], [], []
    for sample, (cores, alike, ranks, nats) in enumerate(
        [((0.6, 0.2), (0.9, 0.7), (8.0, 4.0), 2.0), ((0.3, 0.3), (0.5, 0.5), (10.0, 20.0), 3.0)]
    ):
        for block, value in zip(("prelude", "core1", "core2"), (9.0, *cores), strict=True):
            t = -1 if block == "prelude" else int(block[-1]) - 1
            update.append({"sample": sample, "block": block, "t": t, "value": value})
        for t, value in enumerate(alike):
            for estimator, shift in (("biased", 0.0), ("debiased", -0.4)):
                pair = {"state_a": f"h{t}", "state_b": f"h{t + 1}", "kernel": "rbf"}
                cka.append(
                    {"sample": sample, **pair, "estimator": estimator, "value": value + shift}
                )
        for state, value in zip(("h0", "h2"), ranks, strict=True):
            rank.append({"sample": sample, "state": state, "measure": "effective", "value": value})
            rank.append({"sample": sample, "state": state, "measure": "stable", "value": 1.0})
        loss.append({"sample": sample, "value": nats})
    made = {"update": update, "cka": cka, "rank": rank, "loss": loss}
    return Tables(**{name: frame(name, rows) for name, rows in made.items()}, **changes)


def test_signs_of_each_sample_follow_from_the_tables():
    found = per_sample(tables())
    expected = {
        "loss": [2.0, 3.0],
        "first_share": [0.75, 0.5],
        "cka_biased": [0.8, 0.5],
        "cka_debiased": [0.4, 0.1],
        "erank_0": [8.0, 10.0],
        "erank_K": [4.0, 20.0],
        "erank_ratio": [0.5, 2.0],
    }
    assert list(found.columns) == ["model", "sample", *(s.name for s in SIGNS)]
    for sign, values in expected.items():
        np.testing.assert_allclose(found[sign], values, rtol=1e-12)


def test_means_and_deviations_are_over_samples():
    table = signs(tables()).set_index("sign")
    assert table.loc["erank_ratio", "mean"] == pytest.approx(1.25)
    assert table.loc["erank_ratio", "std"] == pytest.approx(np.std([0.5, 2.0], ddof=1))
    assert (table["n"] == 2).all() and (table["n_flagged"] == 0).all()


def test_flagged_samples_are_counted_and_left_out():
    given = tables()
    rank = given.rank.copy()
    rank["flag"] = rank["flag"].cat.add_categories("zero")
    rank.loc[rank["state"].eq("h2") & rank["sample"].eq(1), ["flag", "value"]] = ("zero", 999.0)
    given.rank = rank
    table = signs(given).set_index("sign")
    assert table.loc["erank_ratio", "mean"] == pytest.approx(0.5)
    assert (table.loc["erank_ratio", "n"], table.loc["erank_ratio", "n_flagged"]) == (1, 1)
    assert table.loc["erank_0", "n"] == 2


def test_a_missing_table_is_named():
    given = tables()
    given.cka = None
    with pytest.raises(InputError, match="needs cka, which was not measured"):
        signs(given)
    assert set(SCHEMAS) >= {"update", "cka", "rank"}


def test_without_a_loss_table_the_loss_is_unknown():
    given = tables()
    given.loss = None
    assert signs(given).set_index("sign").loc["loss", "n"] == 0
