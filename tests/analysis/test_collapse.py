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


def test_each_loop_has_a_row_and_all_have_the_models_loss():
    found = per_sample(two_loops())
    assert found["model"].tolist() == ["a, H", "a, H", "a, L", "a, L"]
    assert found["loss"].tolist() == [2.0, 3.0, 2.0, 3.0]
    np.testing.assert_allclose(found["first_share"], [0.75, 0.5, 0.25, 0.5])
    table = signs(two_loops())
    assert table["model"].unique().tolist() == ["a, H", "a, L"]


def shown(table: pd.DataFrame, capsys, monkeypatch) -> list[str]:
    from loopscope.printing import print_signs

    monkeypatch.setenv("COLUMNS", "150")
    print_signs(table)
    return capsys.readouterr().out.splitlines()


def test_the_printed_table_has_a_line_per_loop(capsys, monkeypatch):
    lines = shown(signs(two_loops()), capsys, monkeypatch)
    rows = [line.split() for line in lines if line.lstrip().startswith("a, ")]
    assert [row[:4] for row in rows] == [
        ["a,", "H", "2.500", "±0.707"], ["a,", "L", "2.500", "±0.707"],
    ]  # fmt: skip
    assert rows[0][4] == "0.625" and rows[1][4] == "0.375"


@pytest.mark.parametrize("flagged", [False, True])
def test_a_loss_that_was_not_measured_is_a_dash_and_one_left_out_is_counted(
    capsys, monkeypatch, flagged
):
    given = tables()
    if flagged:
        given.loss = given.loss.assign(value=np.nan, flag=pd.Categorical(["nonfinite"] * 2))
    else:
        given.loss = given.loss.iloc[:0]
    table = signs(given)
    row = table.set_index("sign").loc["loss"]
    assert (row["n"], row["n_flagged"]) == (0, 2 if flagged else 0)
    line = next(x for x in shown(table, capsys, monkeypatch) if x.split()[:1] == ["a"])
    assert ("(2 out)" in line) is flagged
    assert "–" in line and "nan" not in line


def test_a_notebook_shows_a_column_per_loop_and_a_dash_for_no_loss():
    from loopscope.analysis.compare import Comparison

    given = two_loops()
    given.loss = given.loss.iloc[:0]
    html = Comparison(tables=given, samples={})._repr_html_()
    assert "<th>a, H</th>" in html and "<th>a, L</th>" in html
    assert html.count("<td>–</td>") == 2
