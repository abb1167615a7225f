"""Probe figures from tables alone: what each line is, what is said, and awkward models."""

from io import BytesIO

import numpy as np
import pytest
from scipy import stats

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.rows import Rows, columns
from loopscope.errors import InputError
from loopscope.figures.jobs import plan
from loopscope.figures.probe_lines import probe

CONTROLS = ("none", "types", "shuffled", "untrained")
LEVEL = {"none": 0.7, "types": 0.5, "shuffled": 0.31, "untrained": 0.4}
SAMPLES = 30


def probe_tables(
    model="mesh", labels=("next",), targets=("h_emb", "h0", "h1", "h_out"), controls=CONTROLS,
    *, numbers=False, documents=10, given=None, seed=0,
):  # fmt: skip
    """A table with a rise along the targets in the score alone, and its provenance."""
    keys = [(name, target, c) for name in labels for target in targets for c in controls]
    rows = Rows("probe", SAMPLES, columns(("labels", "target", "control"), keys))
    random = np.random.default_rng([seed, *model.encode()])
    for row, (_, target, control) in enumerate(keys):
        rise = 0.05 * targets.index(target) * (control == "none")
        rows.values["score"][:, row] = random.normal(LEVEL[control] + rise, 0.05, SAMPLES)
        rows.values["baseline"][:, row] = 0.0 if numbers else 0.33
        rows.values["cross_entropy"][:, row] = np.nan if numbers else 1.1
    frame = rows.frame(model)
    frame["document"] = [f"d{sample % documents}" for sample in frame["sample"]]
    frame["document"] = frame["document"].astype("category")
    options = {"probe": {"labels": given, "folds": 5, "probed_tokens": 32}}
    return Tables(probe=frame, provenance={"models": {model: {"options": options}}})


def lines(ax, label):
    return [line for line in ax.get_lines() if line.get_label() == label]


def small_print(fig):
    return " ".join(fig.get_supxlabel().split())


def draw(fig):
    fig.savefig(BytesIO(), format="png", dpi=40)


NAMES = {
    "none": "probe", "types": "control task", "untrained": "untrained twin",
    "shuffled": "shuffled labels",
}  # fmt: skip


def test_each_line_is_a_mean_over_samples_with_its_interval_by_document():
    tables = probe_tables()
    fig = probe(tables)
    [ax] = fig.axes
    frame = tables.probe
    for control, name in NAMES.items():
        [line] = lines(ax, name)
        rows = frame[frame["control"].eq(control)]
        means = rows.groupby("target", observed=True, sort=False)["score"].mean()
        assert line.get_ydata() == pytest.approx(means[["h_emb", "h0", "h1", "h_out"]].to_numpy())
    rows = frame[frame["control"].eq("none") & frame["target"].eq("h1")]
    by_document = rows.groupby("document", observed=True)["score"].mean()  # of equal sizes
    half = stats.t.ppf(0.975, 9) * by_document.std(ddof=1) / np.sqrt(10)
    band = next(c for c in ax.collections if c.get_alpha() == 0.2).get_paths()[0].vertices
    at_h1 = band[band[:, 0] == 2][:, 1]
    assert at_h1.max() - at_h1.min() == pytest.approx(2 * half)


def test_constant_guess_and_embedding_are_drawn_and_named():
    fig = probe(probe_tables())
    [ax] = fig.axes
    assert lines(ax, "guess")[0].get_ydata() == pytest.approx([0.33] * 4)
    [level] = lines(ax, "h_emb")
    assert level.get_ydata()[0] == lines(ax, "probe")[0].get_ydata()[0]
    texts = [text.get_text() for text in fig.legends[0].get_texts()]
    assert texts[:5] == [
        "probe",
        "control task",
        "untrained twin",
        "shuffled labels",
        "selectivity",
    ]
    assert "constant guess" in texts
    assert ax.get_ylabel() == "accuracy: class of the next token"
    assert [t.get_text() for t in ax.get_xticklabels()][2] == "$h(1)$"


def test_the_small_print_says_what_a_probe_shows_and_how_it_was_fitted():
    print_ = small_print(probe(probe_tables()))
    assert "A probe shows what is there, not what is used." in print_
    assert "a random label for each token type" in print_
    assert "Up to 32 tokens a sample, 5 folds that keep documents whole. n = 30 samples." in print_
    given = {"language": {"shape": [30]}}
    print_ = small_print(probe(probe_tables(labels=("language",), given=given)))
    assert "a random label for each document" in print_


def test_a_model_without_twin_has_no_line_of_it():
    fig = probe(probe_tables(controls=("none", "shuffled")))
    [ax] = fig.axes
    assert not lines(ax, "untrained twin") and not lines(ax, "control task")
    assert "Control task" not in small_print(fig)


def test_numbers_have_r2_on_their_axis_and_it_ends_where_nothing_is_explained():
    tables = probe_tables(numbers=True, labels=("position",))
    frame = tables.probe
    frame.loc[frame["control"].eq("untrained"), "score"] -= 7
    [ax] = probe(tables).axes
    assert ax.get_ylabel() == "$R^2$: position of the token"
    assert ax.get_ylim()[0] == pytest.approx(-0.3)


def test_lines_end_where_another_kind_of_target_begins():
    targets = ("h_emb", "h0", "h1", "h_out", "h_m0", "m0@-1", "m0@0", "m1@-1", "m1@0", "w_read@0")
    [ax] = probe(probe_tables(targets=targets)).axes
    assert [len(line.get_xdata()) for line in lines(ax, "probe")] == [4, 1, 2, 2, 1]
    texts = [t.get_text() for t in ax.get_xticklabels()]
    assert texts[4:7] == ["$h_m(0)$", "m0 pre", "m0 0"] and texts[-1] == "read 0"


def test_a_panel_for_each_model_and_labels_with_one_scale_for_the_same_labels():
    tables = Tables.join([
        probe_tables("base", ("next", "x $y")), probe_tables("a" * 120, ("next", "x $y"), seed=1),
    ])  # fmt: skip
    fig = probe(tables)
    assert len(fig.axes) == 4
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()
    assert fig.axes[0].get_title() == "base: next"
    draw(fig)
    assert len(probe(tables, "base", "next").axes) == 1


def test_states_that_are_not_finite_leave_gaps_and_are_counted():
    tables = probe_tables()
    frame = tables.probe
    bad = frame["target"].eq("h1")
    frame.loc[bad, ["score", "baseline"]] = np.nan
    frame["flag"] = frame["flag"].cat.set_categories(["nonfinite"])
    frame.loc[bad, "flag"] = "nonfinite"
    fig = probe(tables)
    assert np.isnan(lines(fig.axes[0], "probe")[0].get_ydata()[2])
    assert "Left out as flagged: +mesh 120 values in 30 samples (nonfinite)" in small_print(fig)
    frame[["score", "baseline"]] = np.nan
    frame["flag"] = frame["flag"].fillna("nonfinite")
    draw(probe(tables))


def test_many_iterations_label_some_states():
    targets = ("h_emb", *(f"h{t}" for t in range(33)), "h_out")
    [ax] = probe(probe_tables(targets=targets)).axes
    texts = [t.get_text() for t in ax.get_xticklabels()]
    assert len(texts) < 14 and {"$h(0)$", "$h(32)$"} <= {*texts}


def test_one_document_or_sample_has_no_interval():
    tables = probe_tables()
    one = Tables(probe=tables.probe[tables.probe["sample"].eq(0)], provenance=tables.provenance)
    draw(probe(one))


def test_each_labels_are_a_figure_of_the_commands(tmp_path):
    tables = probe_tables(labels=("next", "depth"))
    jobs, _ = plan(tables, ["mesh"])
    assert [job.name for job in jobs] == ["probe_next", "probe_depth"]
    for job in jobs:
        draw(job.make())
    tables.save(tmp_path)
    draw(figures.probe(Tables.load(tmp_path), labels="next"))


def test_what_is_not_in_the_table_is_refused():
    with pytest.raises(InputError, match="unknown labels 'nxt'; did you mean next"):
        probe(probe_tables(), labels="nxt")
    with pytest.raises(InputError, match="unknown model 'bas'"):
        probe(probe_tables(), "bas")
    with pytest.raises(InputError, match="needs the table 'probe'"):
        probe(Tables(provenance={}))
