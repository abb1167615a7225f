"""Loss and step along the loop: values, trained loops, far values, and models without any."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError
from loopscope.figures import style
from loopscope.figures.courses import line_looks, with_interval
from loopscope.figures.panels import choose
from loopscope.figures.step_lines import STEP_LABEL
from loopscope.names import READINGS
from tests.figures.course_tables import with_courses

NAMES = {"loss_per_loop": "readout", "steps": "delta"}


def lines_of(fig, label: str | None = None) -> list:
    lines = fig.axes[0].get_lines()
    return [line for line in lines if label is None or line.get_label() == label]


def legend(fig) -> list[str]:
    return [text.get_text() for text in fig.legends[0].get_texts()]


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


def draw(fig) -> None:
    fig.savefig(BytesIO(), format="png", dpi=40)


@pytest.fixture
def two(make):
    return Tables.concat([with_courses(make("base"), more=3), with_courses(make("mesh"))])


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_the_mean_over_samples_at_each_t(two, name):
    fig = getattr(figures, name)(two)
    frame = getattr(two, NAMES[name])
    own = frame[frame["model"].eq("mesh")].groupby("t")["value"].mean()
    [line] = lines_of(fig, "+mesh")
    assert line.get_xdata().tolist() == own.index.tolist()
    assert line.get_ydata() == pytest.approx(own.to_numpy())


@pytest.mark.parametrize(("name", "last"), [("loss_per_loop", 3), ("steps", 2)])
def test_beyond_the_trained_loops_a_line_is_dotted_from_a_large_marker_on(two, name, last):
    fig = getattr(figures, name)(two, "base")
    [whole] = lines_of(fig, "base")
    [more] = lines_of(fig, "_more")
    [end] = lines_of(fig, "_end")
    assert whole.get_xdata().tolist() == list(range(last + 1))
    assert more.get_xdata().tolist() == [last, last + 1, last + 2, last + 3]
    assert more.get_linestyle() == ":" and more.get_marker() == "none"
    assert end.get_xdata().tolist() == [last]
    assert end.get_markersize() > whole.get_markersize()
    assert "Dotted: more loops" in small_print(fig)
    assert "Dotted" not in small_print(getattr(figures, name)(two, "mesh"))


def test_the_band_is_the_interval_of_the_mean_and_never_negative():
    values = np.array([0.5, 0.6, 0.9, 0.4])
    told = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    frame = pd.DataFrame(
        {"mean": [values.mean(), 0.01, 3.0], "error": [stats.sem(values), 0.5, np.nan],
         "clusters": [4, 4, 1]}
    )  # fmt: skip
    found = with_interval(frame)
    assert found.loc[0, ["low", "high"]].tolist() == pytest.approx(list(told))
    assert found.loc[1, "low"] == pytest.approx(0.001)
    assert found.loc[2, ["low", "high"]].tolist() == [3.0, 3.0]


def test_a_loss_far_above_the_last_ones_does_not_flatten_them(make):
    tables = with_courses(make("base"), start=31.0)
    ax = figures.loss_per_loop(tables).axes[0]
    to_axes = ax.transScale.transform
    low, high = ax.get_ylim()

    def height(loss: float) -> float:
        (_, y), (_, bottom), (_, top) = to_axes([(0, loss), (0, low), (0, high)])
        return (y - bottom) / (top - bottom)

    means = tables.readout.groupby("t")["value"].mean()
    assert means[0] > 25 and means[3] < 3
    assert height(means[0]) < 1.0
    assert height(means[2]) - height(means[3]) > 0.05
    linear = (means[2] - means[3]) / (means[0] - means[3])
    assert height(means[2]) - height(means[3]) > 3 * linear
    ticks = ax.get_yticks()
    assert any(t >= 10 for t in ticks) and sum(t < 4 for t in ticks) >= 3


def test_the_upper_part_of_the_axis_is_told_and_absent_where_nothing_is_far(make):
    far = figures.loss_per_loop(with_courses(make("base"), start=31.0))
    near = figures.loss_per_loop(with_courses(make("base"), start=2.9))
    assert "Above the grey line the axis is logarithmic." in small_print(far)
    assert "logarithmic" not in small_print(near)
    assert near.axes[0].get_yscale() == "linear"


def test_an_untrained_twin_has_the_colour_of_its_model_and_is_dashed(make):
    tables = Tables.concat([with_courses(make(n)) for n in ("mesh", "mesh@init", "base")])
    fig = figures.loss_per_loop(tables)
    [mesh], [twin] = lines_of(fig, "+mesh"), lines_of(fig, "+mesh (untrained)")
    assert mesh.get_color() == twin.get_color() == style.VERMILLION
    assert (mesh.get_linestyle(), twin.get_linestyle()) == ("-", "--")
    assert lines_of(fig, "base")[0].get_color() == style.BLUE
    assert "Dashed: untrained." in small_print(fig)


def test_models_that_are_not_of_one_variant_each_get_colours_in_order(make):
    names = ["runs/a", "runs/b", *(f"m{i}" for i in range(6))]
    tables = Tables.concat([make(n, samples=2) for n in names])
    panels = choose(tables, tables.update, None, "update")
    looks = line_looks({}, panels)
    assert [look["color"] for look in looks[:7]] == list(style.LINES)
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 8
    config = {"models": {n: {"config": {"variant": "mesh"}} for n in names}}
    assert line_looks(config, panels) == looks
    config = {"models": {"runs/a": {"config": {"variant": "mesh"}}}}
    assert line_looks(config, panels[:1])[0]["color"] == style.VERMILLION


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("K", [1, 2, 32, 64])
def test_any_number_of_loops_is_drawn(make, name, K):
    tables = with_courses(make("deep", K=K, samples=3), more=K)
    fig = getattr(figures, name)(tables)
    draw(fig)
    labels = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert 1 <= len(labels) <= 15
    assert len(lines_of(fig, "deep")[0].get_xdata()) == K + (name == "loss_per_loop")


@pytest.mark.parametrize("name", NAMES)
def test_eight_models_with_long_names_keep_a_line_of_the_legend_each(make, name):
    path = "/a/very/long/path/to/some/checkpoint/that/does/not/end/"
    names = [f"{path}{'x' * i}/step" for i in range(8)]
    fig = getattr(figures, name)(Tables.concat([with_courses(make(n, samples=3)) for n in names]))
    draw(fig)
    assert len(legend(fig)) == 8
    assert all(text.startswith("…") for text in legend(fig))
    box = fig.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width
    assert box.y0 >= fig.axes[0].get_window_extent().y1 - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_sound_value_is_told_in_the_legend(make, name):
    broken = with_courses(make("broken"))
    frame = getattr(broken, NAMES[name])
    frame.loc[:, "value"] = np.nan
    frame.loc[:, "flag"] = "nonfinite"
    alone = getattr(figures, name)(broken)
    draw(alone)
    count = f"({len(frame):,} flagged)"
    assert [t.get_text() for t in alone.axes[0].texts] == [f"no sound values\n{count}"]
    both = getattr(figures, name)(Tables.concat([with_courses(make("base")), broken]))
    draw(both)
    assert legend(both)[1] == f"broken:\nno sound values\n{count}"
    assert "broken" in small_print(both)


def test_a_state_that_does_not_move_stands_on_the_lower_edge(make):
    tables = with_courses(make("base"))
    tables.delta.loc[tables.delta["t"].eq(2), "value"] = 0.0
    fig = figures.steps(tables)
    draw(fig)
    low, _ = fig.axes[0].get_ylim()
    assert lines_of(fig, "base")[0].get_ydata()[2] == pytest.approx(low)
    assert low > 0
    assert "Steps of exactly 0 stand on the lower edge." in small_print(fig)
    tables.delta.loc[:, "value"] = 0.0
    draw(figures.steps(tables))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_table_is_named(make, name):
    with pytest.raises(InputError, match=f"needs the table '{NAMES[name]}'"):
        getattr(figures, name)(make("base"))


# -- readings, steps without growth ---------------------------------------------------------------


@pytest.fixture
def read(make):
    """A model with all readings and one with raw alone."""
    full = with_courses(make("mesh"), more=2, start=31.0, readings=READINGS, turn=True)
    return Tables.concat([with_courses(make("base")), full])


def titles(fig) -> list[str]:
    return [ax.get_title() for ax in fig.axes]


def own_line(ax, label: str) -> list:
    return [line for line in ax.get_lines() if line.get_label() == label]


def test_each_reading_of_a_state_has_a_panel_of_its_means_on_one_axis(read):
    fig = figures.loss_per_loop(read)
    draw(fig)
    assert titles(fig) == ["raw", "matched", "fitted"]
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss (nats per token)", "", ""]
    for ax, reading in zip(fig.axes, READINGS, strict=True):
        rows = read.readout[read.readout["reading"].eq(reading) & read.readout["model"].eq("mesh")]
        [line] = own_line(ax, "+mesh")
        means = rows[rows["t"].le(3)].groupby("t")["value"].mean()
        assert line.get_ydata() == pytest.approx(means.to_numpy())
        assert max(line.get_xdata()) == 3
    ends = [ax.get_xlim()[1] for ax in fig.axes]
    assert ends[0] > 5 and max(ends[1:]) < 4  # raw alone goes beyond K


def test_the_readings_share_one_legend_and_say_what_they_are(read):
    fig = figures.loss_per_loop(read)
    assert len(fig.legends) == 1 and legend(fig) == ["base", "+mesh"]
    said = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert said == [
        "the coda reads $h(t)$ as it is",
        "each token at its length in $h(K)$",
        "through a map to $h(K)$, fitted on other text",
    ]
    draw(fig)
    for ax in fig.axes:
        words, panel = ax.texts[0].get_window_extent(), ax.get_window_extent()
        assert words.width < 1.05 * panel.width


def test_a_model_without_a_reading_has_no_line_there_and_is_named(read):
    fig = figures.loss_per_loop(read)
    assert [len(own_line(ax, "base")) for ax in fig.axes] == [1, 0, 0]
    assert "No matched values: base. No fitted values: base." in small_print(fig)
    assert "No raw" not in small_print(fig)


@pytest.mark.parametrize(
    ("readings", "shown"),
    [(("raw",), [""]), (("raw", "matched"), ["raw", "matched"]), (("fitted",), ["fitted"])],
)
def test_only_the_readings_that_there_are_get_a_panel(make, readings, shown):
    fig = figures.loss_per_loop(with_courses(make("base"), readings=readings))
    draw(fig)
    assert titles(fig) == shown


def test_a_model_that_was_read_raw_alone_is_drawn_as_if_there_were_no_other(read, make):
    alone = figures.loss_per_loop(with_courses(make("base")))
    chosen = figures.loss_per_loop(read, models="base")
    assert titles(chosen) == titles(alone) == [""]
    assert chosen.get_size_inches().tolist() == alone.get_size_inches().tolist()
    assert chosen.axes[0].get_xlabel() == "the coda reads $h(t)$, after $t$ loops"


def test_far_losses_of_one_reading_bend_the_axis_of_all(read):
    fig = figures.loss_per_loop(read)
    assert "Above the grey line the axis is logarithmic." in small_print(fig)
    heights = [ax.transData.transform((0, 3.0))[1] for ax in fig.axes]
    assert heights == pytest.approx([heights[0]] * 3)
    assert all(len(ax.patches) == 1 for ax in fig.axes)


def test_a_reading_without_a_sound_value_says_so_in_its_panel(make):
    tables = with_courses(make("base"), readings=READINGS)
    broken = tables.readout["reading"].eq("matched")
    tables.readout.loc[broken, "value"] = np.nan
    fig = figures.loss_per_loop(tables)
    draw(fig)
    assert legend(fig) == ["base"]
    assert fig.axes[1].texts[-1].get_text() == f"no sound values\n({broken.sum():,} flagged)"
    assert "No matched values: base." in small_print(fig)


def test_the_turn_stands_beside_the_step_on_its_axis(make):
    tables = with_courses(make("mesh"), more=2, turn=True)
    fig = figures.steps(tables)
    draw(fig)
    assert titles(fig) == ["step", "turn"]
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()
    for ax, column in zip(fig.axes, ("value", "turn"), strict=True):
        means = tables.delta[tables.delta["t"].lt(3)].groupby("t")[column].mean()
        assert own_line(ax, "+mesh")[0].get_ydata() == pytest.approx(means.to_numpy())
    assert "Turn: the step without growth in length." in small_print(fig)
    low, high = fig.axes[0].get_ylim()
    assert low < tables.delta["turn"].mean() < tables.delta["value"].mean() < high


def test_a_turn_of_nothing_stands_on_the_lower_edge_beside_a_step_that_grows(make):
    tables = with_courses(make("mesh"), turn=True)
    tables.delta["turn"] = 0.0
    fig = figures.steps(tables)
    draw(fig)
    low, _ = fig.axes[1].get_ylim()
    assert own_line(fig.axes[1], "+mesh")[0].get_ydata() == pytest.approx([low] * 3)
    assert "Steps of exactly 0 stand on the lower edge." in small_print(fig)


def test_steps_without_any_turn_have_one_panel_and_a_model_without_is_named(read, make):
    alone = figures.steps(with_courses(make("base")))
    assert titles(alone) == [""] and alone.axes[0].get_ylabel() == STEP_LABEL
    both = figures.steps(read)
    assert titles(both) == ["step", "turn"]
    assert "No turn values: base." in small_print(both)
