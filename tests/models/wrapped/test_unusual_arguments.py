"""Forward passes with arguments of their own: keywords, dataclasses, dicts, lists of steps."""

import pytest
import torch

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.by_hand import by_hand, change
from tests.standins.injected import Carried, Carry, Driven
from tests.standins.per_loop import Timed
from tests.standins.repeated import Depth


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(7))


def all_equal(found, wanted) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_keywords_of_the_example_are_passed_on_in_every_call(tokens):
    module = Driven()
    model = ls.wrap(module, {"input_ids": tokens, "return_logits": True})
    traj = ls.capture(model, tokens, logits=True)
    with torch.no_grad():
        states = module.states(tokens, start=traj.h[0])
    assert str(model.map) == "1+2R3+1" and model.map.random
    assert all_equal(traj.h, states.loops[0].h) and all_equal(traj.h_m, states.loops[0].h_m)
    assert torch.equal(traj.logits, states.logits)
    assert torch.equal(traj.h_emb, states.h_emb) and torch.equal(traj.h_out, states.h_out)


def test_the_state_is_told_from_what_stands_beside_it(tokens):
    """The adapter is given the state and the prelude's output, both of the state's width."""
    module = Driven()
    model = ls.wrap(module, {"input_ids": tokens, "return_logits": True})
    start = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(4))
    hook = ("loop.1.hook_in", lambda x, hook: change(x))
    patched = model.run_with_hooks(tokens, start=start, fwd_hooks=[hook])
    with by_hand(module, "transformer.adapter", 1, "in"):
        assert torch.equal(patched, module(tokens, return_logits=True, start=start)["logits"])


def test_a_random_start_is_drawn_once_per_position_not_per_sample(tokens):
    model = ls.wrap(Driven(), {"input_ids": tokens, "return_logits": True})
    pair, alone = ls.capture(model, tokens).h[0], ls.capture(model, tokens[1:]).h[0]
    assert torch.equal(pair[0], pair[1]) and torch.equal(pair[0], alone[0])


def test_states_handed_over_in_a_dataclass_are_found(tokens):
    module = Carried()
    generator = torch.Generator().manual_seed(5)
    carry = Carry(*(torch.randn(2, 11, 32, generator=generator) for _ in range(2)))
    model = ls.wrap(module, (carry, {"inputs": tokens}))
    assert str(model.map) == "0+(2R2+3)R2+0"
    assert [it.grad for it in model.map.loop("L").iterations] == [False] * 3 + [True]
    traj = ls.capture(model, (carry, {"inputs": tokens}))
    with torch.no_grad():
        states = module.states(tokens, carry)
    outer, inner = states.loops
    assert all_equal(traj.h_m, outer.h_m) and all_equal(traj.h, outer.h)
    assert all_equal(traj.others["L"].h_m, inner.h_m) and all_equal(traj.others["L"].h, inner.h)
    assert torch.equal(traj.h_emb, states.h_emb)


def test_results_in_a_tuple_of_a_dataclass_and_a_dict_keep_their_form(tokens):
    module = Carried()
    carry = Carry(torch.zeros(2, 11, 32), torch.ones(2, 11, 32))
    model = ls.wrap(module, (carry, {"inputs": tokens}))
    hook = ("loop.H1.L0.L_level.layers.1.mlp.hook_out", lambda x, hook: change(x))
    found, outputs = model.run_with_hooks(
        (carry, {"inputs": tokens}), return_type="output", fwd_hooks=[hook]
    )
    with by_hand(module, "L_level.layers.1.mlp", 2, "out"):
        wanted, logits = module(carry, {"inputs": tokens})
    assert type(found) is Carry and list(outputs) == ["logits", "q"]
    assert torch.equal(found.high, wanted.high)
    assert torch.equal(outputs["logits"], logits["logits"])


@pytest.mark.parametrize("steps", [[0.5, 0.5], [0.2, 0.3, 0.1, 0.4, 0.0]])
def test_a_list_of_steps_says_how_often_to_loop(steps, tokens):
    module = Timed()
    model = ls.wrap(module, {"idx": tokens, "steps": steps})
    assert len(steps) == model.map.K
    assert torch.equal(model(tokens), module(tokens, steps=steps)[0])
    assert len(steps) == ls.capture(model, tokens).K


def test_more_steps_than_on_the_example_are_refused_with_a_way_out(tokens):
    model = ls.wrap(Depth(), tokens)
    with pytest.raises(InputError, match="loops"):
        model.run_with_cache(tokens, num_steps=6)


def test_text_ids_of_another_length_and_batch_need_no_new_map(tokens):
    module = Driven()
    model = ls.wrap(module, {"input_ids": tokens, "return_logits": True})
    longer = torch.cat([tokens, tokens[:, :6]], dim=1)[:1]
    traj = ls.capture(model, longer, logits=True)
    with torch.no_grad():
        states = module.states(longer, start=traj.h[0])
    assert traj.logits.shape == (1, 17, 61)
    assert torch.equal(traj.logits, states.logits)
