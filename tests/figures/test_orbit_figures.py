"""Figures of trajectories: redrawn from a table alone, in every shape that a model may have."""

import numpy as np
import pandas as pd
import pytest
import torch

import loopscope as ls
from loopscope.analysis.tables import Tables
from loopscope.figures import attention_drift, early_exit, orbit, orbit_path, plan
from loopscope.figures.exit_lines import _gains
from tests.conftest import make_model


def measured(layout="1+2R3+1", variant="base", name="base", loops=None, samples=3):
    model = make_model(variant, layout)
    model.name = name
    tokens = torch.randint(61, (samples, 12), generator=torch.Generator().manual_seed(3))
    return ls.orbit(model, tokens, loops=loops, contraction_samples=1, power_steps=2)


@pytest.fixture(scope="module")
def two():
    return Tables.concat([measured(loops=5), measured(variant="mesh", name="mesh")])


@pytest.fixture(scope="module")
def saved(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    two.save(folder)
    return Tables.load(folder)


def test_every_figure_is_drawn_from_saved_tables(saved):
    jobs, missing = plan(saved)
    names = {job.name for job in jobs}
    assert names == {
        "orbit", "orbit_direction", "early_exit", "orbit_path_base", "orbit_path_mesh",
        "attention_drift_base", "attention_drift_mesh",
    }  # fmt: skip
    assert not missing
    for job in jobs:
        job.make().canvas.draw()


def test_lines_are_the_means_of_the_table_and_dotted_beyond_K(two):
    fig = orbit(two, ["base"])
    step = fig.axes[0]
    frame = two.orbit[two.orbit["model"].eq("base")]
    frame = frame[frame["view"].eq("state") & frame["part"].eq("core")]
    expected = frame.groupby("t")["size"].mean().to_numpy()
    whole = next(line for line in step.lines if line.get_label() == "base")
    more = next(line for line in step.lines if line.get_label() == "_more")
    np.testing.assert_allclose(whole.get_ydata(), expected[:3])
    np.testing.assert_allclose(more.get_ydata(), expected[2:5])
    assert more.get_linestyle() == ":"


def test_shares_of_kinds_fill_a_bar_each(two):
    bars = orbit(two).axes[5].patches
    totals = {}
    for bar in bars:
        totals[bar.get_y()] = totals.get(bar.get_y(), 0) + bar.get_width()
    assert len(totals) == 2
    np.testing.assert_allclose(list(totals.values()), 1)


def test_a_heat_map_for_each_layer_holds_the_means(two):
    fig = attention_drift(two, "mesh")
    maps = [ax.collections[0].get_array() for ax in fig.axes[:2]]
    frame = two.attention_drift[two.attention_drift["model"].eq("mesh")]
    for layer, grid in enumerate(maps):
        expected = frame[frame["layer"].eq(layer)].groupby(["head", "t"])["value"].mean()
        np.testing.assert_allclose(np.asarray(grid).ravel(), expected.to_numpy())


def test_gains_are_differences_from_fixed_loops_on_the_same_sample():
    rows = [("loops", t, t, 5.0 - t) for t in range(4)]
    rows += [("step", 0.1, 1.5, 3.2), ("step", 0.2, 3.0, 2.0)]
    frame = pd.DataFrame(rows, columns=["rule", "threshold", "iterations", "loss"])
    frame = frame.assign(model="m", step=pd.NA, loop="core", sample=0, document=None, flag=None)
    np.testing.assert_allclose(_gains(frame)["loss"], [3.2 - 3.5, 0.0])


@pytest.mark.parametrize(
    "layout, loops, name",
    [("1+2R1+1", None, "one"), ("0+1R8+0", 10, "eight"), ("1+2R2+1", 3, "a/very/long/name" * 4)],
)
def test_one_loop_many_loops_and_long_names_are_drawn(layout, loops, name):
    tables = measured(layout, name=name, loops=loops)
    for fig in (orbit(tables), early_exit(tables), orbit_path(tables, name)):
        fig.canvas.draw()
    if len(tables.attention_drift):
        attention_drift(tables, name).canvas.draw()


def test_one_loop_has_no_drift_and_no_kind():
    tables = measured("1+2R1+1")
    assert len(tables.attention_drift) == 0
    assert tables.orbit["settles"].isna().all()


def test_unknown_parts_are_named_with_those_that_are(two):
    with pytest.raises(ls.errors.InputError, match="layer0"):
        orbit(two, part="layer7")
    layer = orbit(two, part="layer0")
    layer.canvas.draw()
