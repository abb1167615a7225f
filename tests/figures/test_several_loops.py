"""Models with several loops: a panel or a figure for each, iterations labelled by their place."""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, UnknownNameError
from loopscope.figures.names import loop_file_names
from tests.figures.loop_tables import join, nested


@pytest.fixture
def hrm(make) -> Tables:
    return nested(make, B=6)


@pytest.fixture
def quick(monkeypatch):
    """Write names instead of figures."""
    import loopscope.figures.drawing as output

    def write(fig, path, kind):
        path.write_text(fig.get_suptitle())

    monkeypatch.setattr(output, "_write", write)


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


@pytest.mark.parametrize("name", ["update", "cka", "spectrum"])
def test_each_loop_gets_a_panel_with_its_name(hrm, make, name):
    fig = getattr(figures, name)(Tables.concat([hrm, make("base")]))
    assert [t for ax in fig.axes if (t := ax.get_title())] == ["hrm, H", "hrm, L", "base"]


def test_rank_lines_are_one_per_loop(hrm):
    [legend] = figures.rank(hrm).legends
    assert [t.get_text() for t in legend.get_texts()] == ["hrm, H", "hrm, L"]


def test_bars_of_a_loop_are_its_own_and_labelled_by_their_place(hrm, make):
    fig = figures.update(Tables.concat([hrm, make("base")]))
    assert ticks(fig.axes[0].xaxis) == ["prelude", "H0", "H1", "coda"]
    assert ticks(fig.axes[1].xaxis) == [
        "prelude", "H0.L0", "H0.L1", "H0.L2", "H1.L0", "H1.L1", "H1.L2", "coda",
    ]  # fmt: skip
    assert ticks(fig.axes[2].xaxis)[1] == "1st core"
    here = hrm.update["loop"].eq("L") & hrm.update["block"].eq("core4")
    height = fig.axes[1].patches[4].get_height()
    assert height == pytest.approx(hrm.update.loc[here, "value"].mean())
    assert "H0.L1: iteration 1 of L in iteration 0 of H." in small_print(fig)


def test_iterations_of_one_loop_are_numbered_and_nothing_is_explained(make):
    tables = make("base")
    told = {"map": {"loops": [{"name": "core", "paths": ["0", "1", "2"]}]}}
    tables.provenance["models"] = {"base": told}
    fig = figures.update(tables)
    assert ticks(fig.axes[0].xaxis) == ["prelude", "1st core", "2nd core", "3rd core", "coda"]
    assert "iteration" not in small_print(fig)


def test_paths_that_are_no_loop_and_number_are_explained_in_general(make):
    tables = join("odd", {"x": make("odd", K=2)}, {"x": ["first", "second"]})
    assert "second: an iteration's place in the loops" in small_print(figures.update(tables))


def test_loops_after_each_other_are_explained_by_one_of_them(make):
    loops = {"A": make("albert", K=2), "B": make("albert", K=2)}
    tables = join("albert", loops, {"A": ["A0", "A1"], "B": ["B0", "B1"]})
    assert "A1: iteration 1 of A." in small_print(figures.update(tables))
    assert "iteration" not in small_print(figures.cka(tables))


@pytest.mark.parametrize("name", ["fig1", "routers"])
def test_one_loops_figure_shows_it_and_no_other(hrm, name):
    fig = getattr(figures, name)(hrm, "hrm", "L")
    assert fig.get_suptitle() == "hrm, L"
    [mesh] = [c for c in fig.axes[1].collections if isinstance(c, QuadMesh)]
    frame = hrm.cka if name == "fig1" else hrm.routing
    own = frame[frame["loop"].eq("L")]
    if name == "fig1":
        assert mesh.get_array().shape == (9, 9)
        own = own[own["kernel"].eq("rbf") & own["estimator"].eq("biased")]
        pair = own[own["state_a"].eq("h4") & own["state_b"].eq("h5")]["value"]
        assert mesh.get_array()[5, 6] == pytest.approx(pair.mean())
    else:
        assert ticks(fig.axes[0].yaxis) == [
            "transition", "H0.L0", "H0.L1", "H0.L2", "H1.L0", "H1.L1", "H1.L2",
        ]  # fmt: skip
        assert ticks(fig.axes[2].xaxis)[2:4] == ["H0.L0", "H0.L1"]
        assert mesh.get_array().shape == (7, 6)
        cell = own[own["kind"].eq("read") & own["t"].eq(3) & own["target"].eq("m2")]["mean"]
        assert mesh.get_array()[4, 2] == pytest.approx(cell.mean())
        beside = [t.get_text() for t in fig.axes[3].texts]
        assert beside[:2] == ["transition", "H0.L0"]
    assert "n = 40 samples." in small_print(fig)


@pytest.mark.parametrize("name", ["fig1", "routers"])
def test_several_loops_need_a_choice_and_an_unknown_one_is_named(hrm, name):
    with pytest.raises(InputError, match=r"'hrm' has 2 loops.*H, L; .*Give loop='H'"):
        getattr(figures, name)(hrm, "hrm")
    with pytest.raises(UnknownNameError, match=r"unknown loop 'M'.*holds: H, L"):
        getattr(figures, name)(hrm, "hrm", "M")


def test_draw_all_writes_a_figure_for_each_loop(hrm, make, tmp_path, quick):
    report = figures.draw_all(Tables.concat([hrm, make("base")]), tmp_path)
    assert [f.stem for f in report.files[10::2]] == [
        "fig1_hrm_H", "fig1_hrm_L", "fig1_base", "routers_hrm_H", "routers_hrm_L",
    ]  # fmt: skip
    drawn = {f.stem: f.read_text() for f in report.files}
    assert drawn["fig1_hrm_L"] == drawn["routers_hrm_L"] == "hrm, L"
    again = figures.draw_all(make("base"), tmp_path)
    assert {f.stem for f in again.removed} == {
        "fig1_hrm_H", "fig1_hrm_L", "routers_hrm_H", "routers_hrm_L",
    }  # fmt: skip


def test_a_loop_without_routers_is_named_and_the_other_keeps_its_name(hrm, tmp_path, quick):
    hrm.routing = hrm.routing[hrm.routing["loop"].eq("L")]
    report = figures.draw_all(hrm, tmp_path)
    told = {n.figure: n.reason for n in report.not_drawn}
    assert told == {"routers_hrm_H": "its loop H has no memory slots and no gates"}
    assert "routers_hrm_L" in {f.stem for f in report.files}
    assert figures.routers(hrm, "hrm").get_suptitle() == "hrm, L"


def test_what_no_loop_has_is_said_once_of_the_model(make, tmp_path, quick):
    tables = nested(make)
    tables.routing = tables.tokens = Tables.concat([make("mesh", B=6)]).routing.iloc[:0]
    report = figures.draw_all(tables, tmp_path)
    told = {n.figure: n.reason for n in report.not_drawn}
    assert told == {"routers_hrm": "it has no memory slots and no gates"}


def test_files_of_loops_are_never_those_of_another_model():
    cases = [("hrm", "H"), ("hrm", "h"), ("hrm_L", None), ("hrm", "L"), ("a/b", "x y"), ("c", None)]
    named = loop_file_names(cases)
    assert len({name.casefold() for name in named.values()}) == len(cases)
    assert named["hrm_L", None] == "hrm_L"
    assert named["hrm", "L"].startswith("hrm_L-")
    assert named["c", None] == "c"
    assert all("/" not in name and " " not in name for name in named.values())


def test_every_figure_of_several_loops_draws_without_a_warning(hrm):
    for job in figures.plan(hrm)[0]:
        job.make().savefig(BytesIO(), format="png", dpi=40)


@pytest.mark.parametrize("name", ["cka", "spectrum", "rank"])
def test_figures_of_states_tell_which_iteration_they_enter(hrm, name):
    told = small_print(getattr(figures, name)(hrm))
    assert "hrm, L: $h(t)$ enters the $t$-th of the iterations H0.L0 … H1.L2," in told


def test_a_caption_of_three_lines_cuts_no_title_off(make):
    fig = figures.cka(Tables.concat([nested(make, flagged=3), make("base")]))
    fig.draw_without_rendering()
    assert fig.get_supxlabel().count("\n") == 2
    tops = [ax.title.get_window_extent().y1 for ax in fig.axes[:3]]
    assert max(tops) <= fig.bbox.height
    assert np.ptp(tops) < 1
