"""Statistics over samples: what is averaged, what is left out, what is counted."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loopscope.analysis.collapse.clusters import Totals
from loopscope.analysis.tables import aggregate


def table(rows, columns, model="base", step=None, loop="core"):
    frame = pd.DataFrame(rows, columns=["sample", *columns])
    frame.insert(0, "model", pd.Categorical([model] * len(frame), ["unused", "base", "mesh"]))
    frame.insert(1, "step", pd.array([step] * len(frame), dtype="Int64"))
    frame.insert(3, "loop", pd.Categorical([loop] * len(frame)))
    if "flag" not in frame:
        frame["flag"] = pd.Categorical([None] * len(frame), ["zero"])
    return frame


def updates(values, flags=None, **where):
    rows = [(s, "core1", 0, v, f) for s, (v, f) in enumerate(zip(values, flags, strict=True))]
    frame = table(rows, ["block", "t", "value", "flag"], **where)
    return frame.astype({"block": "category", "flag": "category"})


def test_mean_and_deviation_are_numpys_with_ddof_1():
    values = [0.1, 0.9, 1.7, -3.0]
    [row] = aggregate.means(updates(values, [None] * 4), "update").to_dict("records")
    assert row["mean"] == pytest.approx(np.mean(values), abs=1e-15)
    assert row["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-15)
    assert (row["n"], row["n_flagged"]) == (4, 0)


def in_documents(documents):
    values = np.random.default_rng(len(documents)).normal(size=len(documents)) + 3.0
    frame = updates(values.tolist(), [None] * len(documents))
    frame.insert(3, "document", pd.Categorical(documents))
    [row] = aggregate.with_errors(frame, ["block", "t"]).to_dict("records")
    return row, values


def test_the_error_of_a_mean_is_that_of_the_documents():
    names = [*"aaaabbbccddefghhh"]  # eight documents of unequal size
    row, values = in_documents(names)
    labels = pd.factorize(np.array(names))[0]
    expected = Totals.of(values, labels, by_document=True)
    assert row["error"] == pytest.approx(expected.error, rel=1e-12) and row["clusters"] == 8
    assert row["mean"] == pytest.approx(values.mean()) and row["n"] == 17


@pytest.mark.parametrize("names", [[None] * 9, [*"aaabbbccd"]])
def test_without_eight_documents_each_window_counts_by_itself(names):
    row, values = in_documents(names)
    assert row["error"] == pytest.approx(stats.sem(values), rel=1e-12) and row["clusters"] == 9


def test_flagged_and_nan_rows_are_counted_and_not_averaged():
    frame = updates([1.0, 1e6, np.nan, np.inf, 4.0], [None, "zero", None, None, None])
    [row] = aggregate.means(frame, "update").to_dict("records")
    assert row["mean"] == 2.5
    assert row["std"] == pytest.approx(np.std([1.0, 4.0], ddof=1))
    assert (row["n"], row["n_flagged"]) == (2, 3)


def test_a_cell_without_a_sound_row_stays_and_says_so():
    [row] = aggregate.means(updates([0.0, 0.0], ["zero", "zero"]), "update").to_dict("records")
    assert np.isnan(row["mean"])
    assert (row["n"], row["n_flagged"]) == (0, 2)


def test_one_sample_has_a_mean_and_no_deviation():
    [row] = aggregate.means(updates([0.7], [None]), "update").to_dict("records")
    assert row["mean"] == 0.7
    assert np.isnan(row["std"])


def test_categories_without_rows_do_not_appear():
    result = aggregate.means(updates([1.0], [None]), "update")
    assert list(result["model"].astype(str)) == ["base"]


def test_models_and_steps_are_kept_apart_and_in_order_of_appearance():
    parts = [
        updates([5.0], [None], model="mesh", step=20),
        updates([3.0], [None], model="mesh", step=3),
        updates([1.0], [None], model="base"),
    ]
    result = aggregate.means(pd.concat(parts, ignore_index=True), "update")
    assert result["mean"].tolist() == [5.0, 3.0, 1.0]
    assert result["step"].tolist()[:2] == [20, 3]
    assert pd.isna(result["step"].iloc[2])


def test_statistics_do_not_depend_on_the_order_of_rows():
    frame = updates(list(np.random.default_rng(0).normal(size=30)), [None] * 30)
    shuffled = frame.sample(frac=1, random_state=1)
    one, other = (aggregate.means(f, "update").iloc[0] for f in (frame, shuffled))
    assert one["mean"] == pytest.approx(other["mean"], abs=1e-15)
    assert one["std"] == pytest.approx(other["std"], abs=1e-15)


def test_spectrum_is_averaged_on_log10_and_without_padding():
    rows = [
        (0, "h0", 0, 0.1, -1.0, None),
        (1, "h0", 0, 0.001, -3.0, None),
        (0, "h0", 1, np.nan, np.nan, "short"),
        (1, "h0", 1, np.nan, np.nan, "short"),
    ]
    frame = table(rows, ["state", "i", "sigma_rel", "log10_sigma_rel", "flag"])
    [row] = aggregate.means(frame, "spectrum").to_dict("records")
    assert (row["i"], row["mean"], row["n"], row["n_flagged"]) == (0, -2.0, 2, 0)
    assert row["std"] == pytest.approx(np.sqrt(2))
    counts = aggregate.left_out(frame, "log10_sigma_rel").iloc[0]
    assert (counts["samples"], counts["flagged_values"]) == (2, 0)


def test_cka_keeps_kernels_estimators_and_pairs_apart():
    rows = [
        (s, a, b, kernel, estimator, value + s)
        for s in (0, 1)
        for value, (a, b, kernel, estimator) in enumerate(
            [
                ("h0", "h1", "rbf", "biased"),
                ("h0", "h1", "rbf", "debiased"),
                ("h0", "h1", "linear", "biased"),
                ("h0", "h2", "rbf", "biased"),
            ]
        )
    ]
    frame = table(rows, ["state_a", "state_b", "kernel", "estimator", "value"])
    assert aggregate.means(frame, "cka")["mean"].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_rank_keeps_measures_apart():
    rows = [(0, "h0", "effective", 9.0), (0, "h0", "stable", 2.0), (1, "h0", "stable", 3.0)]
    result = aggregate.means(table(rows, ["state", "measure", "value"]), "rank")
    assert result["mean"].tolist() == [9.0, 2.5]


def test_routing_averages_weights_and_entropy_and_alpha_needs_no_entropy():
    rows = [
        (0, "write", -1, "m0", 0.2, 1.0),
        (1, "write", -1, "m0", 0.6, 2.0),
        (0, "alpha", 0, "h_emb", 0.5, np.nan),
        (1, "alpha", 0, "h_emb", 1.0, np.nan),
    ]
    write, alpha = aggregate.routing(
        table(rows, ["kind", "t", "target", "mean", "entropy"])
    ).to_dict("records")
    assert (write["mean"], write["entropy"]) == (0.4, 1.5)
    assert (alpha["mean"], alpha["n"], alpha["n_flagged"]) == (0.75, 2, 0)
    assert np.isnan(alpha["entropy"])


def test_entropy_leaves_out_what_the_weights_leave_out():
    rows = [
        (0, "write", 0, "m0", 0.2, 1.0, None),
        (1, "write", 0, "m0", 0.6, 9.0, "nonfinite"),
    ]
    frame = table(rows, ["kind", "t", "target", "mean", "entropy", "flag"])
    assert aggregate.routing(frame)["entropy"].tolist() == [1.0]


def test_loss_is_averaged_per_model():
    frame = table([(0, 3.0), (1, 4.0)], ["value"])
    [row] = aggregate.means(frame, "loss").to_dict("records")
    assert (row["model"], row["mean"], row["n"]) == ("base", 3.5, 2)


def test_left_out_counts_values_and_the_samples_they_lie_in():
    frame = pd.concat(
        [updates([1.0, 0.0, 2.0], [None, "zero", None]), updates([np.nan, 0.0, 2.0], [None] * 3)],
        ignore_index=True,
    )
    frame.loc[4, "value"] = np.nan
    [row] = aggregate.left_out(frame).to_dict("records")
    assert (row["samples"], row["flagged_values"], row["flagged_samples"]) == (3, 3, 2)
    assert row["reasons"] == "nonfinite, zero"


def test_where_nothing_is_flagged_no_reason_is_given():
    [row] = aggregate.left_out(updates([1.0, 2.0], [None, None])).to_dict("records")
    assert (row["samples"], row["flagged_values"], row["reasons"]) == (2, 0, "")


def test_statistics_import_neither_matplotlib_nor_torch():
    code = (
        "import sys, loopscope.analysis.tables.aggregate, loopscope.analysis.tables.frames;"
        "print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
