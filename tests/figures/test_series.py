"""Signs of collapse over training."""

from io import BytesIO

import numpy as np
import pytest

from loopscope import figures
from loopscope.errors import InputError
from loopscope.figures.series_panels import signs_of
from tests.report import cases


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


def panel(fig, title: str):
    return next(ax for ax in fig.axes if " ".join(ax.get_title().split()) == title)


@pytest.fixture(scope="module")
def told():
    return cases.with_series(cases.summary())


@pytest.fixture(scope="module")
def drawn(told):
    return figures.series(signs_of(told), told["series"], told["measures"])


def test_the_signs_of_a_summary_are_a_row_per_step_and_sign(told):
    frame = signs_of(told)
    assert len(frame) == 2 * len(cases.STEPS) * len(cases.MEASURES)
    row = frame[frame["model"].eq("runs/good") & frame["step"].eq(500) & frame["sign"].eq("skew")]
    assert row[["mean", "n"]].to_numpy().tolist() == [[0.2, 40]]
    assert signs_of(cases.summary()).empty


def test_every_measure_has_a_panel_with_its_title_and_unit(drawn):
    titles = [" ".join(ax.get_title().split()) for ax in drawn.axes if ax.get_visible()]
    assert titles == [title for _, title, *_ in cases.MEASURES]
    assert panel(drawn, "gain of the loop").get_ylabel() == "nats/token"


def test_lines_are_means_and_bands_intervals_of_each_run(drawn, told):
    ax = panel(drawn, "effective rank of h(K)")
    line = next(one for one in ax.get_lines() if one.get_label() == "runs/good")
    assert line.get_xdata().tolist() == list(cases.STEPS)
    assert line.get_ydata().tolist() == [60.0] * 6
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((58.2, 61.8))


def test_the_onset_of_a_verdict_is_a_line_after_a_shade_and_told(drawn):
    ax = panel(drawn, "effective rank of h(K)")
    dashed = [line for line in ax.get_lines() if list(line.get_xdata()) == [1500, 1500]]
    assert len(dashed) == 1
    assert [p.get_x() for p in ax.patches] == [1000.0]
    assert "collapsed from step 1,500 (not yet at 1,000)" in small_print(drawn)


def test_missing_checkpoints_are_crosses(drawn):
    ax = panel(drawn, "skew")
    [cross] = [line for line in ax.get_lines() if line.get_label() == "_missing"]
    assert list(cross.get_xdata()) == [2000]
    assert "×: missing or unreadable checkpoints." in small_print(drawn)


def test_the_first_steps_do_not_flatten_the_rest(drawn):
    low, high = panel(drawn, "loss").get_ylim()
    assert high < 8 and low < 2.5
    assert "may lie outside the panels loss." in small_print(drawn)


def test_evenly_spaced_steps_are_on_a_linear_axis_and_doubling_ones_on_a_logarithmic(told):
    frame = signs_of(told)
    assert figures.series(frame).axes[0].get_xscale() == "linear"
    doubling = frame.assign(step=frame["step"].map(lambda s: 0 if s == 0 else 4 ** (s // 250)))
    fig = figures.series(doubling)
    assert fig.axes[0].get_xscale() == "symlog"
    fig.savefig(BytesIO(), format="png", dpi=40)


def test_a_series_without_values_is_refused(told):
    frame = signs_of(told)
    with pytest.raises(InputError, match="no sign of collapse has a value"):
        figures.series(frame.assign(mean=np.nan, n=0))
    with pytest.raises(InputError, match="no sign of collapse has a value"):
        figures.series(signs_of(cases.summary()))


def test_one_step_and_one_sample_are_drawn(told):
    frame = signs_of(told)
    one = frame[frame["step"].eq(500) & frame["model"].eq("runs/good")]
    fig = figures.series(one.assign(low=np.nan, high=np.nan, n=1))
    fig.savefig(BytesIO(), format="png", dpi=40)
    assert "n = 1 sample." in small_print(fig)


def test_draw_all_takes_the_series_from_a_summary(told):
    tables = cases.series_tables()
    jobs = {job.name: job.make for job in figures.plan(tables, None, told)[0]}
    assert "collapsed from step 1,500" in small_print(jobs["series"]())
    _, missing = figures.plan(tables, None, cases.summary())
    assert "the summary holds no checkpoint of a series" in {m.reason for m in missing}


def test_few_checkpoints_are_all_shown(told):
    frame = signs_of(told)
    few = frame[frame["step"].isin([0, 500, 3000])]
    low, high = panel(figures.series(few), "loss").get_ylim()
    shown = few[few["sign"].eq("loss")]
    assert low <= shown["low"].min() and high >= shown["high"].max()
