"""Gates alone, gates beside routers, and routers of ports without a transition."""

from io import BytesIO

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from loopscope import figures
from loopscope.analysis.tables.frames import Tables, stack
from tests.figures.conftest import TEXT, finish
from tests.figures.loop_tables import gate_frames, join


def with_gates(tables: Tables, name: str, gates: dict[str, list[int]]) -> Tables:
    for table, frame in gate_frames(gates, TEXT).items():
        made, before = finish(frame, name, None), getattr(tables, table)
        setattr(tables, table, made if before is None else stack([before, made]))
    return tables


@pytest.fixture
def ouro(make) -> Tables:
    return with_gates(make("ouro", K=4), "ouro", {"model.exit_gate": [0, 1, 2]})


def meshes(ax) -> list[np.ndarray]:
    return [c.get_array() for c in ax.collections if isinstance(c, QuadMesh)]


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def small_print(fig) -> str:
    return " ".join(fig.get_supxlabel().split())


def draw(fig) -> None:
    fig.savefig(BytesIO(), format="png", dpi=40)


def test_a_gate_alone_shows_its_means_entropies_and_one_text(ouro):
    fig = figures.routers(ouro, "ouro")
    ax = fig.axes[0]
    assert ax.get_title("left") == (
        "gate model.exit_gate: mean probability, entropy H, token by token"
    )
    mean, seen = meshes(ax)
    assert (mean.shape, seen.shape) == ((3, 1), (3, 40))
    found = [c for c in ax.collections if isinstance(c, QuadMesh)]
    assert [c.get_coordinates()[0, 0, 0] for c in found] == [0, 3]  # side by side
    own = ouro.routing[ouro.routing["t"].eq(1)]
    assert mean[1, 0] == pytest.approx(own["mean"].mean())
    assert f"{own['entropy'].mean():.2f}" in [t.get_text() for t in ax.texts]
    token = ouro.tokens[ouro.tokens["t"].eq(2) & ouro.tokens["pos"].eq(7)]["value"]
    assert seen[2, 7] == pytest.approx(token.item())
    assert ticks(ax.yaxis) == ["$t=0$", "$t=1$", "$t=2$"]
    assert ticks(ax.xaxis)[:2] == ["def", "␣load"]
    assert fig.axes[-1].get_ylabel() == "probability"
    assert "at most 0.69" in small_print(fig)
    assert "slots" not in small_print(fig)
    draw(fig)


def test_gates_stand_under_each_other_by_name(make):
    gates = {"router.0": [0], "router.1": [1], "exit": [0, 1]}
    tables = with_gates(make("mor"), "mor", gates)
    ax = figures.routers(tables, "mor").axes[0]
    assert [t.get_text() for t in ax.texts if t.get_text() in gates] == list(gates)
    assert [m.shape for m in meshes(ax)] == [
        (1, 1), (1, 40), (1, 1), (1, 40), (2, 1), (2, 40),
    ]  # fmt: skip
    assert ticks(ax.yaxis) == ["$t=0$", "$t=1$", "$t=0$", "$t=1$"]


def test_gates_are_drawn_without_a_token_table(ouro):
    ouro.tokens = None
    fig = figures.routers(ouro, "ouro")
    assert [m.shape for m in meshes(fig.axes[0])] == [(3, 1)]
    assert "No token-by-token table" in small_print(fig)
    draw(fig)


def test_gates_stand_below_the_routers(make):
    tables = with_gates(make("mesh", B=6), "mesh", {"exit": [0, 1, 2]})
    fig = figures.routers(tables, "mesh")
    titles = [ax.get_title() or ax.get_title("left") for ax in fig.axes[:-1]]
    assert titles[:2] == ["write weights", "read weights"]
    assert titles[3:5] == ["write weights, token by token", "read weights, token by token"]
    assert titles[5].startswith("gate exit: mean probability")
    assert fig.axes[-1].get_ylabel() == "weight or probability"
    alone = figures.routers(make("mesh", B=6), "mesh")
    assert np.array_equal(meshes(fig.axes[0])[0], meshes(alone.axes[0])[0])
    draw(fig)


def test_gates_of_a_nested_loop_are_labelled_by_their_place(ouro):
    tables = join("hrm", {"L": ouro}, {"L": ["H0.L0", "H0.L1", "H1.L0", "H1.L1"]})
    fig = figures.routers(tables, "hrm")
    assert ticks(fig.axes[0].yaxis) == ["H0.L0", "H0.L1", "H1.L0"]
    assert "iteration 1 of L in iteration 0 of H" in small_print(fig)


def test_a_gate_without_sound_values_says_so(ouro):
    ouro.routing.loc[:, ["mean", "entropy"]] = np.nan
    fig = figures.routers(ouro, "ouro")
    texts = [" ".join(t.get_text().split()) for t in fig.axes[0].texts]
    assert "no sound values (120 flagged)" in texts
    assert texts.count("n/a") == 3
    draw(fig)


def test_routers_of_a_port_without_a_transition_have_two_maps_from_the_first_iteration(make):
    tables = make("port", B=6)
    for name in ("routing", "tokens"):
        frame = getattr(tables, name)
        setattr(tables, name, frame[frame["t"].ge(0) & ~frame["kind"].eq("alpha")])
    fig = figures.routers(tables, "port")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["write weights", "read weights"]
    assert [ax.get_title("left") for ax in fig.axes[2:4]] == [
        "write weights, token by token", "read weights, token by token",
    ]  # fmt: skip
    assert ticks(fig.axes[0].yaxis) == ["$t=0$", "$t=1$", "$t=2$"]
    own = tables.routing[tables.routing["kind"].eq("write") & tables.routing["t"].eq(0)]
    own = own[own["target"].eq("m1")]["mean"]
    assert meshes(fig.axes[0])[0][0, 1] == pytest.approx(own.mean())
    draw(fig)


def test_draw_all_plans_a_figure_for_a_model_that_has_gates_only(ouro):
    jobs, missing = figures.plan(ouro)
    assert "routers_ouro" in {job.name for job in jobs}
    assert missing == ()
