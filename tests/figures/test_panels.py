"""What is asked for, what exists, and what a figure says of its samples."""

import pandas as pd
import pytest

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, UnknownNameError
from loopscope.figures import panels

DRAW = ["update", "cka", "spectrum", "rank"]


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


@pytest.mark.parametrize("name", [*DRAW, "fig1", "routers"])
def test_a_missing_table_is_named_with_those_that_exist(name):
    tables = Tables(loss=pd.DataFrame({"model": ["base"]}))
    draw = getattr(figures, name)
    with pytest.raises(InputError, match=r"needs the table '\w+'.*there is: loss"):
        draw(tables) if name in DRAW else draw(tables, "base")


@pytest.mark.parametrize("name", DRAW)
def test_an_unknown_model_is_named_with_those_that_exist(four, name):
    with pytest.raises(UnknownNameError, match=r"unknown model 'mash'; did you mean mesh") as e:
        getattr(figures, name)(four, ["mash"])
    assert "holds: base, residual, anchor, mesh" in str(e.value)


@pytest.mark.parametrize("name", ["fig1", "routers"])
def test_an_unknown_model_is_named_where_one_is_drawn(four, name):
    with pytest.raises(UnknownNameError, match="unknown model 'vanilla'"):
        getattr(figures, name)(four, "vanilla")


def test_asking_for_no_model_is_an_error(four):
    with pytest.raises(InputError, match="no model was asked for"):
        figures.update(four, [])


@pytest.mark.parametrize("name", ["update", "cka", "spectrum"])
def test_panels_stand_in_the_order_asked_for_once_each(four, name):
    fig = getattr(figures, name)(four, ["mesh", "base", "mesh"])
    titles = [t for ax in fig.axes if (t := ax.get_title())]
    assert titles == ["+mesh", "base"]


def test_one_model_may_be_given_as_a_string(four):
    fig = figures.update(four, "anchor")
    assert [ax.get_title() for ax in fig.axes] == ["+anchor"]


def test_a_series_gets_one_panel_per_step(series):
    fig = figures.update(series)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["+mesh, step 0", "+mesh, step 1,000", "+mesh, step 20,000"]
    heights = [ax.patches[0].get_height() for ax in fig.axes]
    frame = series.update
    for step, height in zip((0, 1000, 20000), heights, strict=True):
        values = frame.loc[frame["step"].eq(step) & frame["block"].eq("prelude"), "value"]
        assert height == pytest.approx(values.mean())


@pytest.mark.parametrize("name", ["fig1", "routers"])
def test_one_models_figure_refuses_to_mix_steps(series, name):
    with pytest.raises(InputError, match=r"holds 3 of 'mesh'.*step 1,000.*Select the rows"):
        getattr(figures, name)(series, "mesh")


def test_panels_wrap_to_rows_and_none_is_left_empty(make):
    names = [f"model {i}" for i in range(11)]
    fig = figures.update(Tables.concat([make(n, samples=3) for n in names]))
    assert [ax.get_title() for ax in fig.axes] == names
    assert fig.get_figwidth() <= 7.0
    assert fig.axes[0].get_gridspec().nrows == 3


def test_samples_are_counted_once_where_equal_and_per_model_where_not(four, mixed):
    assert "n = 40 samples each." in small_print(figures.update(four, ["base", "mesh"]))
    assert "n = 40 samples." in small_print(figures.update(four, ["base"]))
    assert "n samples: vanilla 7, +mesh 40" in small_print(
        figures.update(mixed, ["vanilla", "mesh"])
    )


def test_flagged_values_are_told_and_sound_models_not_mentioned(four):
    assert "Left out as flagged: +anchor 3 values in 1 sample (zero)." in small_print(
        figures.update(four)
    )
    assert "Left out as flagged: +anchor 1 value in 1 sample (nonfinite)." in small_print(
        figures.cka(four)
    )
    assert "flagged" not in small_print(figures.update(four, ["base"]))
    assert "(a) 3 values in 1 sample (zero), (b) 1 value in 1 sample (nonfinite)" in small_print(
        figures.fig1(four, "anchor")
    )


def test_a_long_name_is_broken_and_keeps_its_end():
    title = panels.wrapped("/a/very/long/path/to/some/checkpoint/step_20000", 12)
    assert title.replace("\n", "").endswith("checkpoint/step_20000")
    assert title.startswith("…")
    assert max(map(len, title.split("\n"))) <= 12


def test_panels_of_two_sizes_fill_rows_of_one_size_each():
    assert panels.pack([1, 1, 1, 1, 1, 2, 2, 2, 1], columns=4) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 2), (4, 0), (6, 0),
    ]  # fmt: skip


def test_a_map_of_many_states_gets_twice_the_width_and_the_others_keep_theirs(make):
    models = [make(n) for n in ("base", "anchor", "mesh")] + [make("deep", K=12)]
    fig = figures.cka(Tables.concat(models))
    spans = [len(ax.get_subplotspec().colspan) for ax in fig.axes[:4]]
    assert spans == [1, 1, 1, 2]


def test_options_other_than_the_defaults_are_told_where_they_matter(make):
    tables = Tables.concat([make("base"), make("mesh")])
    options = {"drop_first": 4, "center": True, "normalize_rows": False, "bandwidth": 0.5}
    tables.provenance["models"] = {n: {"options": dict(options)} for n in ("base", "mesh")}
    assert "Measured with: first 4 tokens left out." in small_print(figures.update(tables))
    assert "left out, RBF bandwidth t = 0.5." in small_print(figures.cka(tables))
    assert "left out, states centred for spectrum and ranks." in small_print(
        figures.spectrum(tables)
    )
    tables.provenance["models"]["base"] = {"options": {"drop_first": 0, "bandwidth": 1.0}}
    assert "Measured with: +mesh: first 4 tokens left out." in small_print(figures.update(tables))
    assert "Measured with" not in small_print(figures.update(tables, "base"))
