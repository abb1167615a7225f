"""A diverged model: every value is flagged, and the figures say so instead of failing."""

from io import BytesIO

import numpy as np
import pytest

from loopscope import figures
from loopscope.analysis.tables.frames import Tables

NAMES = ["update", "cka", "spectrum", "rank"]
VALUES = {
    "update": ["value"],
    "cka": ["value"],
    "spectrum": ["sigma_rel", "log10_sigma_rel"],
    "rank": ["value"],
    "routing": ["mean", "entropy"],
    "tokens": ["value"],
}


def diverged(make, name: str = "broken", samples: int = 5) -> Tables:
    tables = make(name, B=6, samples=samples)
    for table, columns in VALUES.items():
        frame = getattr(tables, table)
        frame.loc[:, columns] = np.nan
        frame.loc[:, "flag"] = "nonfinite"
    return tables


def told(ax) -> list[str]:
    texts = (" ".join(t.get_text().split()) for t in ax.texts)
    return [text for text in texts if text.startswith("no sound values")]


def legend(fig) -> set[str]:
    return {text.get_text() for one in fig.legends for text in one.get_texts()}


def draw(fig) -> None:
    fig.savefig(BytesIO(), format="png", dpi=40)


def count(tables: Tables, name: str) -> int:
    frame = getattr(tables, name)
    if name == "cka":
        frame = frame[frame["kernel"].eq("rbf") & frame["estimator"].eq("biased")]
    if name == "rank":
        frame = frame[frame["measure"].eq("effective")]
    return len(frame)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_sound_values_is_told_alone(make, name):
    tables = diverged(make)
    fig = getattr(figures, name)(tables)
    draw(fig)
    assert told(fig.axes[0]) == [f"no sound values ({count(tables, name):,} flagged)"]
    assert "(nonfinite)" in fig.get_supxlabel()


@pytest.mark.parametrize("name", ["update", "cka", "spectrum"])
@pytest.mark.parametrize("first", ["broken", "mesh"])
def test_a_model_without_sound_values_leaves_the_others_as_they_are(make, name, first):
    broken, sound = diverged(make), make("mesh", B=6)
    alone = getattr(figures, name)(sound)
    parts = [broken, sound] if first == "broken" else [sound, broken]
    fig = getattr(figures, name)(Tables.concat(parts))
    draw(alone)
    draw(fig)
    panels = fig.axes[:2] if first == "broken" else fig.axes[1::-1]
    assert [ax.get_title() for ax in panels] == ["broken", "+mesh"]
    assert told(panels[0]) == [f"no sound values ({count(broken, name):,} flagged)"]
    assert told(panels[1]) == []
    assert panels[0].get_xlim() == pytest.approx(panels[1].get_xlim())
    assert panels[1].get_ylim() == pytest.approx(alone.axes[0].get_ylim())
    assert panels[1].get_yscale() == alone.axes[0].get_yscale()
    assert legend(fig) == legend(alone)


def test_the_rank_legend_names_a_model_without_sound_values(make):
    broken = diverged(make)
    fig = figures.rank(Tables.concat([broken, make("mesh")]))
    draw(fig)
    assert told(fig.axes[0]) == []
    labels = [" ".join(t.get_text().split()) for t in fig.legends[0].get_texts()]
    assert labels == [f"broken: no sound values ({count(broken, 'rank')} flagged)", "+mesh"]


@pytest.mark.parametrize(
    "broken", [{"update"}, {"cka"}, {"spectrum"}, {"update", "cka", "spectrum"}]
)
def test_fig1_draws_the_diagnostics_that_are_sound(make, broken):
    tables, bad = make("mesh", samples=5), diverged(make, "mesh")
    for name in broken:
        setattr(tables, name, getattr(bad, name))
    fig = figures.fig1(tables, "mesh")
    draw(fig)
    for ax, name in zip(fig.axes, ("update", "cka", "spectrum"), strict=False):
        wanted = [f"no sound values ({count(bad, name):,} flagged)"] if name in broken else []
        assert told(ax) == wanted
    assert (fig.axes[2].get_legend() is None) is ("spectrum" in broken)
    bottom, top = fig.axes[0].get_ylim()
    assert bottom == 0
    assert top == 1 if "update" in broken else top > 1


def test_a_state_without_sound_values_has_no_line(make):
    tables = make("mesh")
    here = tables.spectrum["state"].eq("h1")
    tables.spectrum.loc[here, "flag"] = "nonfinite"
    for fig in (figures.spectrum(tables), figures.fig1(tables, "mesh")):
        draw(fig)
        [ax] = [a for a in fig.axes if a.get_yscale() == "log"]
        assert "$h(1)$" not in [line.get_label() for line in ax.get_lines()]
        assert len(ax.get_lines()) == 5


def test_router_maps_without_sound_values_say_so(make):
    tables = diverged(make)
    fig = figures.routers(tables, "broken")
    draw(fig)
    assert [len(told(ax)) for ax in fig.axes] == [1, 1, 1, 1, 1, 0]
    assert told(fig.axes[0]) == ["no sound values (120 flagged)"]  # 5 samples, 4 steps, 6 slots
    assert told(fig.axes[3]) == ["no sound values (960 flagged)"]  # 4 steps, 6 slots, 40 tokens
    assert "nan" not in [t.get_text() for ax in fig.axes for t in ax.texts]


def test_a_flagged_token_weight_is_not_drawn(make):
    tables = make("mesh", B=6)
    tables.tokens.loc[tables.tokens["pos"].eq(3), "flag"] = "nonfinite"
    mesh = figures.routers(tables, "mesh").axes[3].collections[0]
    assert mesh.get_array().mask[:, 3].all()
    assert mesh.get_array().mask.sum() == 6


def test_all_figures_of_a_diverged_model_are_drawn(make):
    jobs, missing = figures.plan(Tables.concat([diverged(make), make("mesh", B=6, samples=5)]))
    assert {"fig1_broken", "routers_broken", "fig5_spectrum"} <= {job.name for job in jobs}
    assert missing == ()
    for job in jobs:
        draw(job.make())
