"""Every way in which loops are written: maps and states against a manual unroll."""

from functools import cache

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.standins.registry import CASES, LOOPED
from tests.standins.traps import Failing

ids = [case.name for case in CASES]
looped_ids = [case.name for case in LOOPED]


TOKENS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))
TOKENS[0, 0] = 1  # three steps in the stand-in whose loop depends on it
NAMED = {case.name: case for case in CASES}


@pytest.fixture
def tokens() -> torch.Tensor:
    return TOKENS.clone()


@cache
def opened(name):
    """A stand-in and its wrapped form; made once, as no run changes them."""
    module = NAMED[name].make()
    return module, ls.wrap(module, TOKENS)


def unroll(module, tokens, start=None):
    """The stand-in's own manual unroll; a random initial state is given."""
    with torch.no_grad():
        return module.states(tokens) if start is None else module.states(tokens, start=start)


def logits_of(result) -> torch.Tensor:
    """The logits in what a stand-in returns."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, dict):
        return result.get("logits", result.get("last_hidden_state"))
    return result[0] if isinstance(result, tuple) else result.logits


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_manual_unroll_is_the_forward(case, tokens):
    module = case.make()
    with torch.no_grad():
        if case.random:
            start = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
            result, states = module(tokens, input_states=start), unroll(module, tokens, start)
        else:
            result, states = module(tokens), unroll(module, tokens)
    close = case.name == "token_routed"  # rows one by one: other sums in the matrix products
    assert torch.allclose(logits_of(result), states.logits, atol=1e-5 if close else 0, rtol=0)
    for core, walk in zip(case.cores, states.loops, strict=True):
        assert len(core.layers) == len(walk.h_m) == len(walk.h) - 1
        assert not any(torch.allclose(a, b) for a, b in zip(walk.h_m, walk.h_m[1:], strict=False))


def flat(units) -> tuple[str, ...]:
    return tuple(layer for unit in units for layer in unit.layers)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_map_is_what_a_reader_of_the_code_would_say(case, tokens):
    found = opened(case.name)[1].map
    assert str(found) == case.layout
    assert flat(found.prelude) == case.prelude
    assert flat(found.coda) == case.coda
    assert (found.head, found.norm) == (case.head, case.norm)
    assert (found.causal, found.random) == (case.causal, case.random)
    assert len(found.loops) == len(case.cores)
    names = [loop.name for loop in found.loops]
    for loop, core in zip(found.loops, case.cores, strict=True):
        assert tuple(flat(it.units) for it in loop.iterations) == core.layers
        assert loop.name == core.name or core.name is None
        assert loop.mechanic == core.mechanic
        assert (None if loop.parent is None else names.index(loop.parent)) == core.parent


@pytest.mark.parametrize("case", LOOPED, ids=looped_ids)
def test_paths_say_where_each_iteration_stands(case, tokens):
    module, model = opened(case.name)
    found = model.map
    start = torch.zeros(2, 11, 32) if case.random else None
    for loop, walk in zip(found.loops, unroll(module, tokens, start).loops, strict=True):
        paths = [it.path for it in loop.iterations]
        if walk.path:
            assert paths == walk.path
        assert len(set(paths)) == len(walk.h_m)


@pytest.mark.parametrize("case", LOOPED, ids=looped_ids)
def test_captured_states_equal_the_manual_unroll_bit_for_bit(case, tokens):
    module = case.make()
    model = ls.wrap(module, tokens, spec=case.spec) if case.spec else opened(case.name)[1]
    module = model.module
    traj = ls.capture(model, tokens, logits=True)
    states = unroll(module, tokens, traj.h[0] if case.random else None)
    exact = case.name != "token_routed"  # its manual unroll runs the samples one by one

    def same(a, b):
        return torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5)

    assert same(traj.h_emb, states.h_emb)
    assert same(traj.h_out, states.h_out)
    assert same(traj.logits, states.logits)
    for loop, walk in zip(traj.loops.values(), states.loops, strict=True):
        assert len(loop.h) == len(walk.h) and len(loop.h_m) == len(walk.h_m)
        for t, (found, wanted) in enumerate(zip(loop.h, walk.h, strict=True)):
            assert same(found, wanted), f"h[{t}]"
        for t, (found, wanted) in enumerate(zip(loop.h_m, walk.h_m, strict=True)):
            assert same(found, wanted), f"h_m[{t}]"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_logits_with_capture_are_bit_equal_to_those_without(case, tokens):
    module, model = opened(case.name)
    bare = model(tokens)
    with_capture, cache = model.run_with_cache(tokens)
    assert torch.equal(bare, with_capture)
    assert len(cache) == sum(not name.endswith("hook_state") for name in model.hook_dict)
    if not case.random:
        assert torch.equal(bare, logits_of(module(tokens)))


@pytest.mark.parametrize("case", LOOPED, ids=looped_ids)
def test_every_address_of_an_iteration_holds_that_iterations_tensor(case, tokens):
    module, model = opened(case.name)
    _, cache = model.run_with_cache(tokens)
    loop = model.map.main
    start = cache[f"loop.{loop.iterations[0].path}.hook_in"] if case.random else None
    for walk, found in zip(unroll(module, tokens, start).loops, model.map.loops, strict=True):
        for t, iteration in enumerate(found.iterations):
            for name, wanted in [("hook_in", walk.h[t]), ("hook_out", walk.h_m[t])]:
                got = cache[f"loop.{iteration.path}.{name}"]
                assert torch.allclose(got, wanted, atol=0 if case.name != "token_routed" else 1e-5)


def test_random_initial_states_are_drawn_alike_in_every_capture_and_for_every_sample(tokens):
    case = next(case for case in CASES if case.random)
    model = ls.wrap(case.make(), tokens)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ls.capture(model, tokens)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = ls.capture(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(one.h, two.h, strict=True))
    assert torch.equal(one.h[0][0], one.h[0][1])
    assert one.h[0].std() > 0.5


def test_a_given_initial_state_is_the_one_captured(tokens):
    case = next(case for case in CASES if case.random)
    start = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(3))
    model = ls.wrap(case.make(), tokens)
    _, cache = model.run_with_cache(tokens, input_states=start)
    assert torch.equal(cache["loop.0.hook_in"], start)


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("depth", "argument", "num_steps"),
        ("gated", "attribute", "model.total_ut_steps"),
        ("nano_fork", "config", "n_loop"),
        ("recurring", "argument", "num_recur"),
    ],
)
@pytest.mark.parametrize("loops", [1, 2, 6])
def test_the_number_of_iterations_is_set_where_the_model_allows_it(
    name, kind, count, loops, tokens
):
    case = NAMED[name]
    module = case.make()
    model = ls.wrap(module, tokens)
    assert [(c.kind, c.name) for c in model.map.counts] == [(kind, count)]
    changed = model.with_loops(loops)
    traj = ls.capture(changed, tokens, logits=True)
    more = {"start": traj.h[0]} if case.random else {}
    with torch.no_grad():
        states = module.states(tokens, steps=loops, **more)
    assert torch.equal(traj.logits, states.logits)
    assert all(torch.equal(a, b) for a, b in zip(traj.h, states.loops[0].h, strict=True))
    unchanged = ls.capture(model, tokens).K
    assert unchanged == len(case.cores[0].layers)


def test_a_loop_count_hidden_in_a_plain_object_is_named_by_a_spec(tokens):
    module = NAMED["aliased"].make()
    spec = {"loops": {"attribute": "model.loop_config.num_rec"}}
    model = ls.wrap(module, tokens, spec=spec, loops=5)
    states = module.states(tokens, steps=5)
    assert torch.equal(model(tokens), states.logits)
    assert model.map.K == 5


@pytest.mark.parametrize("name", ["tied_stack", "relaxed", "token_routed"])
def test_iterations_that_are_distinct_modules_cannot_be_more(name, tokens):
    case = NAMED[name]
    with pytest.raises(InputError, match="distinct modules"):
        ls.wrap(case.make(), tokens, loops=2)


def test_a_loop_that_depends_on_the_tokens_is_named_when_its_length_changes(tokens):
    case = NAMED["adaptive"]
    model = ls.wrap(case.make(), tokens)
    other = tokens.clone()
    other[0, 0] = 2
    with pytest.raises(InputError, match="times"):
        ls.capture(model, other)
    assert ls.capture(ls.wrap(model.module, other), other).K == 4


def test_a_forward_that_fails_says_in_which_module_and_what_to_do(tokens):
    with pytest.raises(InputError, match=r"layers\.1(.|\n)*example"):
        ls.wrap(Failing(), tokens)


@pytest.mark.parametrize("name", ["mesh_port", "mesh_port_early"])
def test_routers_of_a_mesh_port_give_the_weights_of_its_cycle(name, tokens):
    module = NAMED[name].make()
    traj = ls.capture(ls.wrap(module, tokens), tokens)
    states = unroll(module, tokens)
    assert traj.mesh_cycle and traj.transition is not None
    with torch.no_grad():
        x = module.model.layers[0](states.h_emb)
        for t, (write, read) in enumerate(
            [
                (traj.transition.w_write, traj.transition.w_read),
                *zip(traj.w_write, traj.w_read, strict=True),
            ]
        ):
            wanted = module.weights(x if t == 0 else states.loops[0].h[t - 1], t)
            assert torch.allclose(write, wanted[0]) and torch.allclose(read, wanted[1])
    assert traj.w_write[0].shape == (2, 11, 6)


def test_exit_gates_are_probabilities_of_leaving_after_each_iteration(tokens):
    module = NAMED["gated"].make()
    traj = ls.capture(ls.wrap(module, tokens), tokens)
    (name,) = traj.gates
    assert "early_exit_gate" in name
    with torch.no_grad():
        for found, wanted in zip(traj.gates[name], module.gates(tokens), strict=True):
            assert torch.allclose(found, wanted)


def test_token_routers_are_gates_of_their_recursions(tokens):
    module = NAMED["token_routed"].make()
    traj = ls.capture(ls.wrap(module, tokens), tokens)
    (name,) = traj.gates
    with torch.no_grad():
        for t, found in enumerate(traj.gates[name]):
            wanted = module.recursions[t].router(traj.h[t]).sigmoid()[..., 0]
            assert torch.allclose(found, wanted)


def test_parameters_of_one_iteration_are_told_from_shared_ones(tokens):
    def of(name):
        return ls.wrap(NAMED[name].make(), tokens).map.main

    lora = of("lora_per_loop")
    for t, iteration in enumerate(lora.iterations):
        wanted = {f"core.{i}.{side}.{t}.weight" for i in range(2) for side in ("up", "down")}
        assert set(iteration.own) == wanted
    assert {"core.0.block.attn.qkv.weight", "core.1.block.mlp.down.bias"} <= set(lora.shared)
    assert not any(".up.0" in name or ".down.1" in name for name in lora.shared)
    norms = of("norm_per_loop")
    for t, iteration in enumerate(norms.iterations):
        assert f"loop_norms.{t}.weight" in iteration.own
    relaxed = of("relaxed")
    assert all(".a." in name or ".b." in name for it in relaxed.iterations for name in it.own)
    assert all(len(it.own) == 2 * 3 * 2 for it in relaxed.iterations)


def test_gradients_that_the_model_cuts_are_said(tokens):
    found = ls.wrap(NAMED["two_clocks"].make(), tokens).map
    inner = found.loop("L")
    assert [it.grad for it in inner.iterations] == [False, False, True] * 2
    assert any("grad" in note for note in found.notes)
