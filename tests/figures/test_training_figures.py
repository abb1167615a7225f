"""Figures of training logs: what is drawn is what the table holds, and what it is called."""

import json
from dataclasses import replace
from functools import partial

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, UnknownNameError
from loopscope.figures import names, style
from loopscope.figures.run_groups import group_labels, run_groups
from loopscope.training.runs import read_runs
from tests.program import called
from tests.training_runs import MESH, add, example, lines_of, note_of, points

SUMS = [
    "residual+anchor",
    "residual+anchor_emb",
    "anchor+anchor_emb",
    "residual+anchor+anchor_emb",
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    return example(tmp_path_factory.mktemp("runs"))


def tokens(step: int) -> int:
    return step * 8 * 16


def test_lines_are_means_over_seeds_and_bands_go_from_least_to_greatest(tables):
    shallow, _ = figures.training(tables).axes
    lines = lines_of(shallow)
    assert list(lines) == [
        "base  3.300 (n=3)", "_unfinished", "+mesh  2.750 (n=1)", "vanilla  2.000 (n=1)"
    ]  # fmt: skip
    base = points(lines["base  3.300 (n=3)"])
    assert base == [pytest.approx([tokens(200), 12.4 / 3]), pytest.approx([tokens(300), 3.3])]
    assert points(lines["+mesh  2.750 (n=1)"]) == [[tokens(s), v] for s, v in MESH.items()]
    (band,) = [c for c in shallow.collections if isinstance(c, PolyCollection)]
    corners = {tuple(xy) for xy in band.get_paths()[0].vertices.tolist()}
    assert corners == {
        (tokens(200), 4.0), (tokens(200), 4.3), (tokens(300), 3.0), (tokens(300), 3.6)
    }  # fmt: skip
    assert to_hex(band.get_facecolor()[0]).upper() == style.BLUE


def test_an_unfinished_run_is_a_thin_line_with_a_cross_at_its_end(tables):
    line = lines_of(figures.training(tables).axes[0])["_unfinished"]
    assert points(line) == [[tokens(100), 9.0], [tokens(200), 8.0]]
    assert line.get_marker() == "x" and line.get_markevery() == [1]
    assert line.get_linewidth() < 1 and line.get_color() == style.BLUE
    alone = replace(tables, training=tables.training.query("model == 'base-going'"))
    fig = figures.training(alone)
    assert list(lines_of(fig.axes[0])) == ["base  8.000 ×"]
    assert "×: unfinished (base-going at 67 %), in no mean." in note_of(fig)


def test_there_is_a_panel_per_layout_with_vanilla_beside_the_loop_it_unrolls(tables):
    fig = figures.training(tables)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["1+2R3+1, $D=32$", "1+3R2+2, $D=32$"]
    assert list(lines_of(fig.axes[1])) == ["base  2.500 (n=1)"]
    assert fig.axes[0].get_xlabel() == "training tokens"
    assert fig.axes[0].get_ylabel() == "validation loss\n(nats per token)"
    assert "vanilla: as many layers of compute, none of them shared." in note_of(fig)
    for ax in fig.axes:
        shown = [text.get_text() for text in ax.get_legend().get_texts()]
        assert shown == [label for label in lines_of(ax) if label != "_unfinished"]


def test_the_note_says_how_many_seeds_there_are(tables, tmp_path):
    assert "bands: least to greatest; n = 1 to 3 seeds per line." in note_of(
        figures.training(tables)
    )
    one = figures.training(tables, ["mesh", "vanilla"])
    assert "One seed per line" in note_of(one) and "bands" not in note_of(one)
    assert list(lines_of(one.axes[0])) == ["+mesh  2.750", "vanilla  2.000"]
    some = figures.training(tables, [f"base-{seed}" for seed in range(3)])
    assert "n = 3 seeds per line" in note_of(some)
    assert list(lines_of(some.axes[0])) == ["base  3.300"]


def test_the_axis_is_fitted_to_what_follows_the_beginning(tmp_path):
    losses = {100: 50.0, 300: 6.0, 1000: 4.0, 2000: 2.0}
    add(tmp_path, "base", "base", steps=2000, losses=losses)
    fig = figures.training(read_runs([tmp_path]))
    low, high = fig.axes[0].get_ylim()
    assert 1.5 < low < 2 and 6 < high < 7
    assert "The first 10 % of a line may lie above the axis." in note_of(fig)
    add(tmp_path, "mesh", "mesh", steps=2000, losses={300: 5.0, 2000: 1.0})
    assert "above the axis" not in note_of(figures.training(read_runs([tmp_path / "mesh"])))


def test_many_panels_share_one_legend(tmp_path):
    for layers in range(1, 6):
        add(tmp_path, f"b{layers}", "base", f"1+{layers}R2+1")
        add(tmp_path, f"m{layers}", "mesh", f"1+{layers}R2+1", seed=layers)
    fig = figures.training(read_runs([tmp_path]))
    assert len([ax for ax in fig.axes if ax.get_visible()]) == 5
    assert not any(ax.get_legend() for ax in fig.axes)
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "+mesh"]


def test_recipes_of_one_variant_are_told_apart_by_what_differs(tmp_path):
    add(tmp_path, "a", "base", lr=1e-3)
    add(tmp_path, "b", "base", lr=2e-3)
    add(tmp_path, "c", "mesh", text="c" * 64)
    add(tmp_path, "d", "mesh", dtype="bfloat16", lr=5e-4, steps=250)
    add(tmp_path, "e", "anchor")
    tables = read_runs([tmp_path])
    _, groups = run_groups(tables)
    labels = dict(zip("abcde", group_labels(groups).values(), strict=True))
    assert labels["a"] == "base, lr=0.001" and labels["b"] == "base, lr=0.002"
    assert labels["c"].startswith("+mesh, recipe ") and labels["d"].startswith("+mesh, recipe ")
    assert labels["c"] != labels["d"] and labels["e"] == "+anchor"
    fig = figures.training(tables)
    assert "Runs differ in dtype, lr, steps. Runs differ in text or vocabulary:" in note_of(fig)
    same = figures.training(tables, ["e", "a"])
    assert "Runs differ in lr." in note_of(same) and "text" not in note_of(same)
    assert list(lines_of(same.axes[0])) != list(lines_of(fig.axes[0]))
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_markerfacecolor())
        for line in fig.axes[0].get_lines()
    }
    assert len(looks) == 5
    tables.provenance["models"].clear()
    _, bare = run_groups(tables)
    assert all(", recipe=" in label for label in list(group_labels(bare).values())[:4])


def test_slots_are_named_where_they_differ(tmp_path):
    add(tmp_path, "k3", "mesh")
    add(tmp_path, "k2", "mesh", "1+3R2+1")

    def labels(rule: bool) -> list[str]:
        _, groups = run_groups(read_runs([tmp_path]))
        return sorted(group_labels(groups, rule=rule).values())

    assert labels(rule=False) == ["+mesh, B=5", "+mesh, B=6"]
    assert labels(rule=True) == ["+mesh, B=K+3"] * 2
    add(tmp_path, "few", "mesh", slots=4)
    assert labels(rule=False) == ["+mesh, B=4", "+mesh, B=5", "+mesh, B=6"]
    assert labels(rule=True) == ["+mesh, B=4", "+mesh, B=K+3", "+mesh, B=K+3"]
    _, alone = run_groups(read_runs([tmp_path / "few"]))
    assert list(group_labels(alone).values()) == ["+mesh"]


def test_memory_between_unshared_layers_is_called_as_in_the_paper(tmp_path):
    add(tmp_path, "a", "mesh")
    add(tmp_path, "b", "mesh", "1+2+2+2+1")
    ax = figures.training(read_runs([tmp_path])).axes[0]
    assert ax.get_title().startswith("1+2R3+1")
    assert {label.split("  ")[0] for label in lines_of(ax)} == {"+mesh", "vanilla+mesh"}


@pytest.mark.parametrize(
    ("variant", "shared", "label"),
    [
        ("anchor_emb", True, "+anchor*"),
        ("residual+anchor+anchor_emb", True, "+residual+anchor+anchor*"),
        ("vanilla", False, "vanilla"),
        ("static", True, "static"),
        ("base", False, "base (unshared)"),
        ("mesh", False, "vanilla+mesh"),
    ],
)
def test_variants_are_named_as_in_the_paper(variant, shared, label):
    assert names.variant_label(variant, shared=shared) == label


def test_counts_are_written_short():
    given = [0, 950, 20_000, 1_250_000, 3_000_000_000, 2.5e11, 1e13]
    assert [names.short_count(v) for v in given] == [
        "0", "950", "20k", "1.25M", "3B", "250B", "10T"
    ]  # fmt: skip


def test_every_variant_has_a_look_of_its_own_and_lines_of_one_share_its_colour():
    every = ["vanilla", "base", "residual", "anchor", "anchor_emb", "static", "dynamic", "mesh"]
    looks = [style.variant_look(v) for v in every + SUMS]
    assert len({look["color"] for look in looks[: len(every)]}) == len(every)
    assert len({look["marker"] for look in looks}) == len(looks)
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == len(looks)
    slots = [style.variant_look("mesh", number) for number in range(6)]
    assert {look["color"] for look in slots} == {style.VERMILLION}
    assert len({str(look["linestyle"]) for look in slots}) == 6
    assert len({(look["marker"], look["markerfacecolor"]) for look in slots}) == 6
    assert style.variant_look("new")["color"] == style.GREY


def test_a_run_without_a_validation_loss_is_named(tables, tmp_path):
    add(tmp_path, "early", "base", stop=90)
    early = read_runs([tmp_path])
    jobs, missing = figures.plan(early)
    assert not jobs
    assert str(missing[0]) == "fig6_training, early: it has no validation loss yet (step 90 of 300)"
    with pytest.raises(InputError, match="no run has a validation loss yet"):
        figures.training(early)


def test_unknown_runs_and_missing_tables_are_refused(tables):
    for draw in (figures.training, figures.layers):
        with pytest.raises(UnknownNameError, match="unknown run 'mash'; did you mean mesh"):
            draw(tables, "mash")
        with pytest.raises(InputError, match="no run was asked for; .* holds: base-0, base-1"):
            draw(tables, [])
        with pytest.raises(InputError, match="needs the table 'training', which was not measured"):
            draw(Tables())


def test_only_what_the_tables_hold_is_planned(tables, make):
    jobs, missing = figures.plan(tables)
    assert [job.name for job in jobs] == ["fig6_training", "fig8_layers"]
    assert [item.model for item in missing] == ["base-going"]
    measured = make("base")
    assert not [item for item in figures.plan(measured)[1] if item.figure.startswith("fig6")]
    both = replace(measured, training=tables.training, provenance=tables.provenance)
    drawn = [job.name for job in figures.plan(both)[0]]
    assert {"fig3_update", "fig1_base", "fig6_training", "fig8_layers"} <= set(drawn)
    assert not [item for item in figures.plan(both)[1] if item.model == "mesh"]
    assert [j.name for j in figures.plan(both, ["mesh", "deep"])[0]] == drawn[-2:]


def test_figures_of_logs_replace_those_of_an_earlier_run_and_the_other_way_round(
    tables, make, tmp_path, monkeypatch
):
    monkeypatch.setattr("loopscope.figures.drawing._write", lambda fig, path, kind: path.touch())
    figures.draw_all(make("base"), tmp_path)
    report = figures.draw_all(tables, tmp_path)
    assert {p.stem for p in report.removed} >= {"fig3_update", "fig1_base"}
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"fig6_training", "fig8_layers"}
    report = figures.draw_all(make("base"), tmp_path)
    assert {p.stem for p in report.removed} == {"fig6_training", "fig8_layers"}


def test_global_rcparams_are_left_alone(tables):
    with mpl.rc_context():
        mpl.rcdefaults()
        before = dict(mpl.rcParams)
        figures.training(tables)._repr_png_()
        figures.layers(tables)._repr_png_()
        assert dict(mpl.rcParams) == before


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program; returns exit code, stdout, stderr."""

    return partial(called, monkeypatch, capsys)


def test_paper_extra_draws_two_figures_from_the_shipped_logs(run, tmp_path):
    code, told, err = run("figures", "--paper-extra", "--out", tmp_path / "a")
    assert code == 0, err
    assert "2 figures" in told and "not drawn" not in told
    drawn = {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    assert drawn == {f"{s}.{k}" for s in ("fig6_training", "fig8_layers") for k in ("png", "pdf")}
    assert [p.name for p in (tmp_path / "a" / "tables").iterdir()] == ["training.parquet"]
    table = pd.read_parquet(tmp_path / "a" / "tables" / "training.parquet")
    told = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert set(told["models"]) == set(table["model"].unique())
    code, _, err = run("figures", "--from-tables", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 0, err
    for path in (tmp_path / "a" / "figures").iterdir():
        assert (tmp_path / "b" / "figures" / path.name).read_bytes() == path.read_bytes()


def test_paper_extra_takes_folders_and_says_what_it_leaves_out(run, tmp_path):
    add(tmp_path / "runs", "one", "base")
    add(tmp_path / "runs", "two", "base", stop=200, seed=1)
    add(tmp_path / "runs", "three", "base", stop=5, seed=2)
    words = ["figures", "mesh", tmp_path / "runs" / "one", tmp_path / "runs", "--paper-extra"]
    code, told, err = run(*words, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"note: left out: {tmp_path / 'runs' / 'three'} has no logged step yet\n" in told
    assert "not drawn: fig8_layers, two: its training is unfinished (step 200 of 300)\n" in told
    table = pd.read_parquet(tmp_path / "out" / "tables" / "training.parquet")
    assert list(table["model"].unique()) == ["mesh", "one", "two"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paper-extra", "--layout", "1+2R3+1"], "no model runs; leave out --layout"),
        (["--paper-extra", "--data", "x.txt"], "leave out --data"),
        (["--paper-extra", "--from-tables", "x"], "leave out --paper-extra"),
        (["--paper-extra", "mseh"], "unknown run 'mseh'; did you mean mesh"),
        (["--paper-extra", "{tmp}"], "holds no training run; a run is a folder with log.csv"),
    ],
)
def test_errors_of_the_user_are_one_line_and_nothing_is_made(run, tmp_path, words, message):
    out = tmp_path / "out"
    words = [word.format(tmp=tmp_path) for word in words]
    code, _, err = run("figures", *words, "--out", out)
    assert code == 2 and err.startswith("error: ") and message in err
    assert len(err.strip().splitlines()) == 1 and not out.exists()
