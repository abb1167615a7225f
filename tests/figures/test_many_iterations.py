"""Thirty-two iterations: some have a label, all are drawn."""

from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.figures.ticks import every, labelled

K = 32


@pytest.fixture(scope="module")
def deep(make):
    return make("deep", K=K, B=K + 3, samples=3, pull=0.93)


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


def touching(axis, start: str) -> bool:
    """Whether two labels of an axis cover each other, along it (`x` or `y`)."""
    axis.get_figure().draw_without_rendering()
    boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
    ends = sorted((getattr(b, f"{start}0"), getattr(b, f"{start}1")) for b in boxes)
    return any(after[0] < before[1] - 1.5 for before, after in pairwise(ends))


def test_round_numbers_are_labelled_with_both_ends():
    assert every(0, 32, 9) == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert every(1, 32, 9) == [1, 4, 8, 12, 16, 20, 24, 28, 32]
    assert every(0, 30, 9) == [0, 4, 8, 12, 16, 20, 24, 30]
    assert every(0, 8, 9) == list(range(9))


@pytest.mark.parametrize("last", range(1, 300, 7))
@pytest.mark.parametrize("most", [2, 5, 9, 20])
def test_labels_are_about_as_many_as_fit_and_not_crowded(last, most):
    found = every(0, last, most)
    assert found[0] == 0 and found[-1] == last
    assert len(found) <= most + 1
    if len(found) > 3:
        gaps = np.diff(found)
        assert gaps.min() >= 0.5 * gaps.max()


def test_names_without_a_number_are_always_labelled():
    names = ["h_emb", *(f"h{t}" for t in range(K + 1)), "h_out"]
    assert labelled(names, 9) == ["h_emb", *(f"h{t}" for t in range(0, K + 1, 4)), "h_out"]
    assert labelled(names, K + 1) == names
    assert labelled(["prelude", "coda"], 2) == ["prelude", "coda"]


def test_a_wide_update_figure_labels_all_bars_and_a_narrow_one_some(deep):
    wide = figures.update(deep).axes[0]
    narrow = figures.fig1(deep, "deep").axes[0]
    assert len(wide.patches) == len(narrow.patches) == K + 2
    assert len(ticks(wide.xaxis)) == K + 2
    assert ticks(narrow.xaxis)[:3] == ["prelude", "1st core", "4th core"]
    assert not touching(wide.xaxis, "x")
    assert not touching(narrow.xaxis, "x")


def test_a_large_map_shows_colours_without_numbers(deep):
    fig = figures.cka(deep)
    [mesh] = [c for c in fig.axes[0].collections if isinstance(c, QuadMesh)]
    assert mesh.get_array().shape == (K + 3, K + 3)
    assert len(fig.axes[0].texts) == 0
    assert ticks(fig.axes[0].xaxis) == [
        r"$h_\mathrm{emb}$", *(f"$h({t})$" for t in range(0, K + 1, 4)), r"$h_\mathrm{out}$",
    ]  # fmt: skip
    assert not touching(fig.axes[0].xaxis, "x")
    assert not touching(fig.axes[0].yaxis, "y")


def test_all_spectra_are_drawn_and_some_listed(deep):
    fig = figures.spectrum(deep)
    assert len(fig.axes[0].get_lines()) == K + 3
    [legend] = fig.legends
    listed = {t.get_text() for t in legend.get_texts()}
    assert "$h(16)$" in listed and "$h(15)$" not in listed
    assert "The legend lists some of the states" in small_print(fig)
    colours = {line.get_color() for line in fig.axes[0].get_lines()}
    assert len(colours) == K + 3


def test_rank_lines_fit_a_page(deep):
    fig = figures.rank(deep)
    assert fig.get_figwidth() < 8
    assert not touching(fig.axes[0].xaxis, "x")


def test_router_maps_show_colours_and_tokens_of_some_steps(deep):
    fig = figures.routers(deep, "deep")
    write, _, alpha, tokens = fig.axes[:4]
    assert ticks(write.xaxis) == ["m0", "m5", "m10", "m15", "m20", "m25", "m30", "m34"]
    assert len(ticks(write.yaxis)) == K + 1
    assert not touching(alpha.xaxis, "x")
    shown = [t.get_text() for t in tokens.texts]
    assert shown == ["transition", "$t=0$", "$t=8$", "$t=16$", "$t=24$", "$t=31$"]
    meshes = [c for c in tokens.collections if isinstance(c, QuadMesh)]
    here = deep.tokens["kind"].eq("write") & deep.tokens["t"].eq(16) & deep.tokens["pos"].eq(3)
    own = deep.tokens[here & deep.tokens["target"].eq("m9")]["value"]
    assert meshes[3].get_array()[9, 3] == pytest.approx(own.item())
    assert "at some of the steps" in small_print(fig)


def test_every_figure_of_many_iterations_draws_without_a_warning(deep):
    for job in figures.plan(deep)[0]:
        job.make().savefig(BytesIO(), format="png", dpi=40)


def test_many_states_of_two_models_stand_side_by_side(make):
    both = Tables.concat([make("a", K=20, samples=2), make("b", K=20, samples=2, seed=1)])
    fig = figures.cka(both)
    maps = [c for ax in fig.axes for c in ax.collections if isinstance(c, QuadMesh)]
    assert [mesh.get_array().size for mesh in maps[:2]] == [23 * 23] * 2
