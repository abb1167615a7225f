"""What the artists hold is what the tables say."""

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh

from loopscope import figures
from loopscope.analysis.tables.frames import Tables
from loopscope.errors import InputError, UnknownNameError
from loopscope.figures.style import short_number


def rows(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column].eq(value)]
    return frame


def mesh_of(ax) -> np.ndarray:
    [mesh] = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return mesh.get_array()


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


# Figure 3


def test_bars_are_means_and_whiskers_deviations_of_unflagged_samples(four):
    fig = figures.update(four)
    ax = fig.axes[2]
    assert ticks(ax.xaxis) == ["prelude", "1st core", "2nd core", "3rd core", "coda"]
    [bars] = [c for c in ax.containers if hasattr(c, "patches")]
    for block, bar, tips in zip(
        ("prelude", "core1", "core2", "core3", "coda"),
        bars.patches,
        bars.errorbar.lines[2][0].get_segments(),
        strict=True,
    ):
        own = rows(four.update, model="anchor", block=block)
        values = own["value"][own["flag"].isna()]
        assert bar.get_height() == pytest.approx(values.mean())
        low, high = tips[:, 1]
        assert high - low == pytest.approx(2 * values.std(ddof=1))
        assert (high + low) / 2 == pytest.approx(values.mean())


def test_update_panels_share_one_axis_with_the_papers_label(four):
    fig = figures.update(four)
    assert fig.axes[0].get_ylabel() == "2‖f(h)−h‖ / (‖f(h)‖+‖h‖)"
    assert len({ax.get_ylim() for ax in fig.axes}) == 1
    assert fig.axes[0].get_ylim()[0] == 0


def test_a_block_that_has_only_flagged_samples_is_marked(make):
    tables = make("base")
    frame = tables.update
    frame.loc[frame["block"].eq("coda"), "flag"] = "shape"
    ax = figures.update(tables).axes[0]
    assert [t.get_text().strip() for t in ax.texts] == ["n/a"]
    assert np.isnan(ax.patches[-1].get_height())


# Figure 4


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_heat_maps_are_symmetric_means(four, kernel, estimator):
    fig = figures.cka(four, kernel=kernel, estimator=estimator)
    image = mesh_of(fig.axes[3])
    assert image.shape == (6, 6)
    assert np.array_equal(image, image.T)
    own = rows(
        four.cka, model="mesh", kernel=kernel, estimator=estimator, state_a="h0", state_b="h_out"
    )
    assert image[1, 5] == pytest.approx(own["value"].mean())
    assert np.allclose(np.diag(image), 1)


def test_heat_maps_say_which_cka_they_show_and_print_their_values(four):
    fig = figures.cka(four, estimator="debiased")
    assert fig.axes[-1].get_ylabel() == "CKA (RBF, debiased)"
    image = mesh_of(fig.axes[0])
    printed = [t.get_text() for t in fig.axes[0].texts]
    assert printed == [short_number(float(v)) for v in image.ravel()]
    assert ticks(fig.axes[0].xaxis)[0] == r"$h_\mathrm{emb}$"
    assert ticks(fig.axes[0].xaxis)[4] == "$h(3)$"


def test_both_estimators_have_the_same_colour_range_and_negatives_are_told(four):
    for estimator in ("biased", "debiased"):
        fig = figures.cka(four, estimator=estimator)
        meshes = [c for ax in fig.axes[:4] for c in ax.collections if isinstance(c, QuadMesh)]
        assert {m.get_clim() for m in meshes} == {(0.0, 1.0)}
        assert ("below 0 as 0" in fig.get_supxlabel()) is (estimator == "debiased")


def test_a_pair_that_has_only_flagged_samples_stays_empty(make):
    tables = make("base")
    here = tables.cka["state_a"].eq("h0") & tables.cka["state_b"].eq("h2")
    tables.cka.loc[here, "value"] = np.nan
    ax = figures.cka(tables).axes[0]
    image = mesh_of(ax)
    assert image.mask[1, 3]
    assert image.mask[3, 1]
    assert image.mask.sum() == 2
    assert len(ax.texts) == 34


def test_a_kernel_or_estimator_that_was_not_measured_is_named(four):
    with pytest.raises(UnknownNameError, match=r"unknown kernel 'cosine'.*rbf, linear"):
        figures.cka(four, kernel="cosine")
    with pytest.raises(UnknownNameError, match=r"unknown estimator 'bias'.*did you mean biased"):
        figures.cka(four, estimator="bias")


# Figure 5


def test_spectrum_lines_and_bands_are_mean_and_deviation_of_the_logarithm(four):
    fig = figures.spectrum(four)
    ax = fig.axes[1]
    assert ax.get_yscale() == "log"
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == [
        r"$h_\mathrm{emb}$", "$h(0)$", "$h(1)$", "$h(2)$", "$h(3)$", r"$h_\mathrm{out}$",
    ]  # fmt: skip
    own = rows(four.spectrum, model="residual", state="h2")
    logs = own["log10_sigma_rel"].to_numpy(np.float64).reshape(40, 50)
    x, y = lines["$h(2)$"].get_data()
    assert np.array_equal(x, np.arange(50))
    np.testing.assert_allclose(np.log10(y), logs.mean(0), atol=1e-12)
    bands = [c for c in ax.collections if isinstance(c, PolyCollection)]
    edge = bands[3].get_paths()[0].vertices
    at_30 = np.log10(np.unique(edge[edge[:, 0] == 30][:, 1]))
    spread = logs.std(0, ddof=1)[30]
    np.testing.assert_allclose(at_30, logs.mean(0)[30] + [-spread, spread], atol=1e-12)


def test_the_spectrum_figure_says_that_it_averages_logarithms(four):
    note = " ".join(figures.spectrum(four).get_supxlabel().split())
    assert r"both of $\log_{10}(\sigma_i/\sigma_0)$" in note


def test_states_have_lines_that_differ_in_colour(mixed):
    [legend] = figures.spectrum(mixed).legends
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == len(colours) == 8


def test_the_legend_reads_by_rows(make):
    [legend] = figures.spectrum(make("mesh", K=12)).legends
    labels = [t.get_text() for t in legend.get_texts()]
    columns = legend._ncols
    per_column = np.array_split(labels, columns)
    assert [c[0] for c in per_column][:3] == [r"$h_\mathrm{emb}$", "$h(0)$", "$h(1)$"]


def test_a_short_spectrum_is_drawn_as_far_as_it_goes(make):
    tables = make("base")
    frame = tables.spectrum
    frame.loc[frame["i"] >= 20, ["log10_sigma_rel", "sigma_rel"]] = np.nan
    frame.loc[frame["i"] >= 20, "flag"] = "short"
    fig = figures.spectrum(tables)
    assert fig.axes[0].get_lines()[0].get_xdata().tolist() == list(range(20))
    assert "flagged" not in fig.get_supxlabel()


# Figure 1


def test_fig1_shows_the_three_diagnostics_of_one_model(four):
    fig = figures.fig1(four, "mesh")
    a, b, c = fig.axes[:3]
    assert [ax.get_title() for ax in (a, b, c)] == [
        "(a) relative update",
        "(b) CKA",
        "(c) spectrum",
    ]
    own = rows(four.update, model="mesh", block="core2")["value"]
    assert a.patches[2].get_height() == pytest.approx(own.mean())
    pair = rows(four.cka, model="mesh", kernel="rbf", estimator="biased", state_b="h1")
    pair = rows(pair, state_a="h_emb")["value"]
    assert mesh_of(b)[0, 2] == pytest.approx(pair.mean())
    logs = rows(four.spectrum, model="mesh", state="h_out", i=7)["log10_sigma_rel"]
    assert np.log10(c.get_lines()[5].get_ydata()[7]) == pytest.approx(logs.mean(), rel=1e-6)
    assert fig.get_suptitle() == "+mesh"


def test_many_states_give_the_heat_map_more_room(make):
    fig = figures.fig1(make("mesh", K=12), "mesh")
    assert mesh_of(fig.axes[1]).shape == (15, 15)
    assert fig.axes[1].get_subplotspec().rowspan == range(0, 2)


# Ranks


def test_rank_lines_are_means_with_deviations_and_do_not_cross_states_a_model_lacks(mixed):
    fig = figures.rank(mixed, ["mesh", "org/deep mesh@init"], measure="stable")
    ax = fig.axes[0]
    assert ax.get_ylabel() == "stable rank"
    line, _, [bars] = ax.containers[0].lines
    y = line.get_ydata()
    own = rows(mixed.rank, model="mesh", state="h3", measure="stable")["value"]
    assert y[4] == pytest.approx(own.mean())
    assert np.isnan(y[5:7]).all()
    low, high = bars.get_segments()[4][:, 1]
    assert high - low == pytest.approx(2 * own.std(ddof=1))


def test_an_unknown_rank_measure_is_named(four):
    with pytest.raises(UnknownNameError, match=r"unknown measure 'efective'.*effective"):
        figures.rank(four, measure="efective")


# Routers


def test_router_maps_hold_mean_weights_with_the_transition_first(four):
    fig = figures.routers(four, "mesh")
    write, read, alpha = fig.axes[:3]
    for ax, kind in ((write, "write"), (read, "read")):
        image = mesh_of(ax)
        assert image.shape == (4, 6)
        assert np.allclose(image.sum(1), 1)
        own = rows(four.routing, kind=kind, t=1, target="m4")["mean"]
        assert image[2, 4] == pytest.approx(own.mean())
        assert ticks(ax.yaxis) == ["transition", "$t=0$", "$t=1$", "$t=2$"]
        assert ticks(ax.xaxis) == [f"m{b}" for b in range(6)]
    image = mesh_of(alpha)
    assert ticks(alpha.yaxis) == ["$h(0)$", "$h(1)$", "$h(2)$", "$h(3)$"]
    assert ticks(alpha.xaxis)[1:] == ["prelude", "1st core", "2nd core", "3rd core"]
    assert image.mask.tolist() == [[c > r + 1 for c in range(5)] for r in range(4)]
    own = rows(four.routing, kind="alpha", t=2, target="core2")["mean"]
    assert image[3, 3] == pytest.approx(own.mean())


def test_entropies_stand_at_the_ends_of_the_rows(four):
    write = figures.routers(four, "mesh").axes[0]
    own = rows(four.routing, kind="write", target="m0")
    wanted = [f"{own['entropy'][own['t'].eq(t)].mean():.2f}" for t in range(-1, 3)]
    beside = [t.get_text() for t in write.texts if t.get_position()[0] > 6]
    assert beside == ["H", *wanted]


def test_slots_are_ordered_by_number(make):
    write = figures.routers(make("mesh", K=9, B=12), "mesh").axes[0]
    assert ticks(write.xaxis) == [f"m{b}" for b in range(12)]


def test_the_token_panels_hold_the_first_forty_tokens_of_each_step(four):
    fig = figures.routers(four, "mesh")
    write, read = fig.axes[3:5]
    meshes = [c for c in read.collections if isinstance(c, QuadMesh)]
    assert [m.get_array().shape for m in meshes] == [(6, 40)] * 4
    own = rows(four.tokens, kind="read", t=0, target="m2", pos=17)["value"]
    assert meshes[1].get_array()[2, 17] == pytest.approx(own.item())
    assert ticks(write.xaxis) == []
    assert ticks(read.xaxis)[:2] == ["def", "␣load"]
    assert ticks(read.xaxis)[39] == r"␣#␣\$"


def test_routers_are_drawn_without_a_token_table(make):
    tables = make("mesh", B=6)
    tables.tokens = None
    fig = figures.routers(tables, "mesh")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["write weights", "read weights"]
    assert "No token-by-token table" in " ".join(fig.get_supxlabel().split())


def test_a_model_without_slots_has_no_router_figure(make):
    tables = Tables.concat([make("mesh", B=6), make("base")])
    alpha = rows(tables.routing, kind="alpha").assign(model="base")
    tables.routing = alpha.astype({"model": "category"})
    with pytest.raises(InputError, match=r"'base' has no router weights.*no memory slots"):
        figures.routers(tables, "base")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.256, ".26"), (1.0, "1"), (0.004, "0"), (-0.004, "0"), (-0.031, "−.03"), (1.25, "1.25"),
     (-0.999, "−1"), (-1.5, "−1.50")],
)  # fmt: skip
def test_cell_values_take_little_room(value, text):
    assert short_number(value) == text
