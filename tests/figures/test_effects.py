"""Figures of interventions: what is drawn where, from their table alone."""

import numpy as np
import pandas as pd
import pytest

from loopscope import plot
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError
from loopscope.figures import plan
from loopscope.figures.effect_places import mark, place_means
from tests.figures.effect_tables import as_tables, effect_table


def titles(fig) -> list[str]:
    return [ax.get_title(loc="left") for ax in fig.axes if ax.get_title(loc="left")]


def points(ax) -> dict[str, np.ndarray]:
    """Heights of the markers by their label."""
    return {str(c.get_label()): np.asarray(c.lines[0].get_ydata(), float) for c in ax.containers}


def text_of(fig) -> str:
    fig.draw_without_rendering()
    return " ".join(t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text")))


def test_a_panel_for_each_kind_shows_the_means_of_total_and_direct_effects():
    tables = effect_table()
    fig = plot.effect(tables, "mesh")
    assert titles(fig) == [
        "iterations: skip", "attention: mean", "MLP: mean", "slots: mean", "writes: mean",
        "reads: mean", "edges of Eq. 7: mean",
    ]  # fmt: skip
    rows = tables.effect
    for kind, ax in zip(("iteration", "slot"), (fig.axes[0], fig.axes[3]), strict=True):
        how = "skip" if kind == "iteration" else "mean"
        for routers in ("recomputed", "frozen"):
            part = rows[rows["kind"].eq(kind) & rows["routers"].eq(routers)]
            means = part.groupby("what", observed=True, sort=False)["loss"].mean()
            np.testing.assert_allclose(points(ax)[f"_{how} {routers}"], means)


def test_whiskers_are_students_interval_of_the_mean_by_document():
    tables = effect_table(samples=9)
    means = place_means(tables.effect, "loss")
    row = means[means["what"].eq("read m1@0") & means["routers"].eq("recomputed")].iloc[0]
    rows = tables.effect[tables.effect["what"].eq("read m1@0")]
    x = rows[rows["routers"].eq("recomputed")]["loss"].to_numpy()
    half = 2.306004135 * x.std(ddof=1) / 3  # t of 8 degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((x.mean() - half, x.mean() + half))


def test_models_without_routers_show_total_effects_alone():
    fig = plot.effect(effect_table("base", B=0), "base")
    assert titles(fig) == ["iterations: skip", "attention: mean", "MLP: mean"]
    assert {*points(fig.axes[0])} == {"_skip recomputed"} and not fig.legends


@pytest.mark.parametrize("value", ["kl", "changed"])
def test_other_values_are_drawn_when_asked_for(value):
    tables = effect_table(K=1, B=2)
    fig = plot.effect(tables, "mesh", value)
    means = tables.effect.groupby("what", observed=True, sort=False)[value].mean()
    assert max(points(fig.axes[0])["_skip recomputed"]) <= means.max() * 2


def test_interchange_is_drawn_with_what_the_base_and_the_source_give():
    rows = [
        (s, what, kind, 0, how, "recomputed", np.nan, np.nan, np.nan, np.nan, np.nan, share)
        for s in range(10)
        for what, kind, how, share in (
            ("loop0", "iteration", "patch", s % 5 > 0), ("loop1", "iteration", "patch", 0.0),
            ("base", "control", "none", 0.1), ("source", "control", "none", 0.3),
        )
    ]  # fmt: skip
    columns = ["sample", "what", "kind", "t", "how", "routers", "loss", "kl", "changed", "mass"]
    frame = pd.DataFrame(rows, columns=[*columns, "mass_norm", "interchange"])
    tables = as_tables(frame.astype({"interchange": float}))
    fig = plot.effect(tables, "mesh")
    np.testing.assert_allclose(points(fig.axes[0])["_patch recomputed"], [0.8, 0.0])
    lines = {float(np.mean(line.get_ydata())) for line in fig.axes[0].lines}
    assert {0.1, 0.3} <= lines
    assert "not patched" in text_of(fig)


def test_mass_against_effect_has_a_point_per_place_and_rho_with_its_interval():
    tables = effect_table()
    fig = plot.mass_effect(tables, "mesh")
    assert titles(fig) == [
        "slots: mean", "writes: mean", "reads: mean", "edges of Eq. 7: mean",
        "attention, MLP: mean",
    ]  # fmt: skip
    assert len(points(fig.axes[1])["recomputed"]) == 24
    rows = tables.effect[tables.effect["kind"].eq("write")]
    rows = rows[rows["routers"].eq("recomputed")]
    means = rows.groupby("what", observed=True)[["mass", "loss"]].mean()
    rho = means["mass"].corr(means["loss"], method="spearman")
    assert f"total: ρ = {rho:.2f} [" in text_of(fig)


def test_too_few_places_give_no_scatter_and_a_reason():
    tables = effect_table("base", K=1, B=0)
    with pytest.raises(InputError, match="no kind of place has 4 places"):
        plot.mass_effect(tables, "base")
    jobs, missing = plan(tables)
    assert [job.name for job in jobs] == ["effect_base"]
    assert [item.figure for item in missing] == ["mass_effect_base"]


def test_masses_that_are_the_same_everywhere_give_no_panel():
    frame = effect_table(K=2, B=2).effect
    frame.loc[frame["kind"].eq("edge"), "mass"] = 1.0
    fig = plot.mass_effect(Tables(effect=frame, provenance={}), "mesh")
    assert "edges of Eq. 7: mean" not in titles(fig) and "reads: mean" in titles(fig)


@pytest.mark.parametrize(
    "changes", [{"K": 8, "B": 10}, {"K": 1, "B": 2}, {"K": 2, "B": 0, "heads": 12},
                {"samples": 1}, {"documents": False}, {"scale": 0.0}]
)  # fmt: skip
def test_any_number_of_places_and_samples_is_drawn(changes):
    tables = effect_table(**changes)
    assert titles(plot.effect(tables, "mesh"))


def test_flagged_values_are_left_out_and_said():
    frame = effect_table(K=1, B=2).effect
    frame["flag"] = pd.Categorical(["nonfinite"] * len(frame), ["nonfinite"])
    fig = plot.effect(Tables(effect=frame, provenance={}), "mesh")
    assert "no sound values" in text_of(fig)


def test_loops_of_a_model_share_a_figure_and_steps_do_not():
    tables = effect_table(K=1, B=0)
    frame = tables.effect
    other = frame.assign(loop=pd.Categorical(["L"] * len(frame)))
    other["what"] = pd.Categorical(["loopH0.L" + w.removeprefix("loop") for w in other["what"]])
    both = pd.concat([frame, other]).astype(dict.fromkeys(("loop", "what"), "category"))
    fig = plot.effect(Tables(effect=both, provenance={}), "mesh")
    assert len(points(fig.axes[0])["_skip recomputed"]) == 2
    steps = pd.concat([frame.assign(step=pd.array([s] * len(frame), "Int64")) for s in (1, 2)])
    with pytest.raises(InputError, match="several steps"):
        plot.effect(Tables(effect=steps, provenance={}), "mesh")


def test_values_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="answers"):
        plot.effect(effect_table(K=1, B=0), "mesh", "interchange")
    with pytest.raises(InputError, match="value"):
        plot.effect(effect_table(K=1, B=0), "mesh", "los")


@pytest.mark.parametrize(
    ("what", "kind", "t", "wanted"),
    [
        ("loop1", "iteration", 1, ("", "1")),
        ("loopH0.L2", "iteration", 2, ("", "H0.L2")),
        ("loop2.layer0.attn", "attention", 2, ("$t=2$", "L0")),
        ("loop0.layer1.head3", "head", 0, ("$t=0$ L1", "3")),
        ("write m2@-1", "write", -1, ("trans.", "m2")),
        ("h_m0>h2", "edge", 1, ("$h(2)$", "1st core")),
        ("h0>h2", "edge", 1, ("$h(2)$", "$h(0)$")),
        ("loop0+m1@1", "joint", 0, ("", "loop0+m1@1")),
    ],
)
def test_places_are_labelled_by_what_they_share_and_by_themselves(what, kind, t, wanted):
    assert mark(what, kind, t) == wanted
