"""Places by name: which there are, what is missing and why, and what stands there."""

import pytest
import torch

import loopscope as ls
from loopscope.errors import UnknownNameError
from loopscope.probes import clean_run, place_named, places
from tests.conftest import VARIANTS, make_model
from tests.standins.counted import Segments
from tests.standins.mesh_ports import block_port, llama_port, native_port
from tests.standins.repeated import LayerMajor, TwoClocks
from tests.standins.tied import Relaxed
from tests.standins.two_states import OneModule


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(7))


def names(model, ids, kinds) -> list[str]:
    return [place.name for place in places(model, ls.capture(model, ids), kinds)[0]]


def test_every_kind_of_a_mesh_model_has_its_names(ids):
    model = make_model("mesh", "1+2R2+1", slots=3)
    assert names(model, ids, ["iteration"]) == ["loop0", "loop1"]
    attention = ["loop0.attn", "loop0.layer0.attn", "loop0.layer1.attn"]
    assert names(model, ids, ["attention"])[:3] == attention
    assert names(model, ids, ["mlp"])[3:] == ["loop1.mlp", "loop1.layer0.mlp", "loop1.layer1.mlp"]
    assert names(model, ids, ["slot"]) == [f"m{b}@{t}" for t in (-1, 0, 1) for b in range(3)]
    assert names(model, ids, ["write"])[-1] == "write m2@1"
    assert names(model, ids, ["read"])[0] == "read m0@-1"
    edges = ["h_emb>h0", "prelude>h0", "h_emb>h1", "prelude>h1", "h_m0>h1"]
    edges += ["h_emb>h2", "prelude>h2", "h_m0>h2", "h_m1>h2"]
    assert names(model, ids, ["edge"]) == edges
    assert len(names(model, ids, ["head"])) == 2 * 2 * 4
    trajectory = ls.capture(model, ids)
    every, notes = places(model, trajectory)
    assert not notes and len({place.name for place in every}) == len(every)
    assert all(place_named(model, trajectory, place.name) == place for place in every)


def test_an_edge_stands_at_the_iteration_that_makes_its_state(ids):
    model = make_model("mesh", "1+1R2+1", slots=3)
    edge = place_named(model, ls.capture(model, ids), "h_m0>h2")
    assert (edge.t, edge.state, edge.source, edge.hooks) == (1, "h2", "h_m0", ("coda.hook_in",))


@pytest.mark.parametrize(
    ("variant", "edges"),
    [
        ("base", ["h_m0>h1", "h_m1>h2"]),
        ("residual", ["h_m0>h1", "h0>h1", "h_m1>h2", "h1>h2"]),
        ("anchor", ["h_m0>h1", "h0>h1", "h_m1>h2", "h0>h2"]),
        ("residual+anchor", ["h_m0>h1", "h0>h1", "h_m1>h2", "h1>h2", "h0>h2"]),
        ("anchor_emb", ["h_m0>h1", "h_emb>h1", "h_m1>h2", "h_emb>h2"]),
        ("dynamic", ["h_m0>h1", "h0>h1", "h_emb>h1", "h_m1>h2", "h0>h2", "h_emb>h2"]),
    ],
)
def test_loops_without_memory_have_the_edges_of_their_own_update(variant, edges, ids):
    assert names(make_model(variant, "1+1R2+1", noise=0.2), ids, ["edge"]) == edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_edges_into_a_state_sum_to_it(variant, dtype, ids):
    model = make_model(variant, "1+1R3+1", noise=0.2).to(dtype)
    if variant == "static":
        with torch.no_grad():
            model.recurrence.coefficients += torch.tensor([0.2, -0.3, 0.7], dtype=dtype)
    clean = clean_run(model, ids)
    found, _ = places(model, clean.trajectory, ["edge"])
    for t, h in enumerate(clean.trajectory.h):
        parts = [clean.value(place) for place in found if place.state == f"h{t}"]
        if parts:
            torch.testing.assert_close(sum(parts), h, rtol=1e-4, atol=1e-5)
    first = 0 if variant == "mesh" else 1
    assert {place.state for place in found} == {f"h{t}" for t in range(first, 4)}


def test_a_state_that_is_no_sum_has_no_edges_and_a_line_says_so(ids):
    model = ls.wrap(block_port(decay=0.9), ids)
    every, notes = places(model, ls.capture(model, ids))
    assert {place.kind for place in every} == {"iteration", "attention", "mlp", "head"}
    assert notes == [
        "slot, write, read: the model has no memory slots (or they are not at hand on this input)",
        "edge: the states do not follow from the routers by MeSH Eqs. 2-5",
    ]


def test_a_plain_stack_has_no_places_and_a_line_says_so(ids):
    model = make_model("vanilla", "3")
    every, notes = places(model, ls.capture(model, ids))
    assert not every
    assert notes == [
        "iteration, attention, mlp, edge, head: the model has no loop",
        "slot, write, read: the model has no memory slots (or they are not at hand on this input)",
    ]


def test_virtual_blocks_of_a_plain_stack_are_its_iterations(ids):
    assert names(make_model("vanilla", "1+2+1+1"), ids, ["iteration"]) == ["loop0", "loop1"]


def test_nested_loops_have_the_iterations_of_all_levels(ids):
    expected = ["loopH0", "loopH1", *(f"loopH{a}.L{b}" for a in range(2) for b in range(3))]
    model = ls.wrap(TwoClocks(), ids)
    assert names(model, ids, ["iteration"]) == expected
    place = place_named(model, ls.capture(model, ids), "loopH1.L2")
    assert (place.loop, place.t, place.hooks) == ("L", 5, ("loop.H1.L2.hook_out",))
    assert len(names(ls.wrap(Segments(), ids), ids, ["iteration"])) == 2 + 4 + 12


def test_loops_one_after_the_other_and_two_states_have_iterations(ids):
    found = names(ls.wrap(LayerMajor(), ids), ids, ["iteration"])
    assert found == ["loopA0", "loopA1", "loopA2", "loopB0", "loopB1", "loopB2"]
    assert "loopy1" in names(ls.wrap(OneModule(), ids), ids, ["iteration"])


@pytest.mark.parametrize("make", [block_port, llama_port])
def test_the_heads_of_a_wrapped_attention_sum_to_what_it_gives(make, ids):
    module = make(K=2)
    clean = clean_run(ls.wrap(module, ids), ids)
    whole = clean.value(place_named(clean.model, clean.trajectory, "loop1.layer0.attn"))
    linear = (
        module.core[0].attn.out if make is block_port else module.core[0].layer.self_attn.o_proj
    )
    parts = [
        clean.value(place_named(clean.model, clean.trajectory, f"loop1.layer0.head{head}"))
        @ linear.weight[:, 8 * head : 8 * head + 8].T
        for head in range(4)
    ]
    bias = 0 if linear.bias is None else linear.bias
    torch.testing.assert_close(sum(parts) + bias, whole, rtol=1e-4, atol=1e-5)


def test_an_attention_without_a_plain_projection_has_no_heads_and_a_line_says_so(ids):
    model = ls.wrap(Relaxed(), ids)
    every, notes = places(model, ls.capture(model, ids), ["attention", "head"])
    assert {place.kind for place in every} == {"attention"}
    assert notes == [
        "head: no attention with a known output projection was found in loop0, loop1, loop2"
    ]


def test_unknown_names_list_near_ones_and_what_is_missing(ids):
    model = make_model("base", "1+1R2+1")
    trajectory = ls.capture(model, ids)
    with pytest.raises(
        UnknownNameError, match=r"unknown place 'loop1.atn'; did you mean loop1.att"
    ):
        place_named(model, trajectory, "loop1.atn")
    with pytest.raises(UnknownNameError, match=r"\(slot, write, read: the model has no memory"):
        place_named(model, trajectory, "m1@0")
    with pytest.raises(UnknownNameError, match="unknown kind of place 'neuron'"):
        places(model, trajectory, ["neuron"])


def test_values_have_the_shapes_that_are_documented(ids):
    native = make_model("mesh", "1+2R2+1", slots=3, noise=0.2)
    for model in (native, ls.wrap(native_port(native), ids)):
        clean = clean_run(model, ids)
        shapes = {
            place.name: tuple(clean.value(place).shape)
            for place in places(model, clean.trajectory)[0]
        }
        assert shapes["loop0"] == shapes["m1@-1"] == shapes["h_emb>h0"] == (2, 9, 32)
        assert shapes["loop1.mlp"] == (2, 9, 2, 32)
        assert shapes["loop1.layer1.mlp"] == (2, 9, 32)
        assert shapes["loop0.layer1.head3"] == (2, 9, 8)
        assert shapes["write m2@-1"] == shapes["read m0@1"] == (2, 9)
