"""Random programs of loops are mapped back to the program that made them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import loopscope as ls
from tests.models.wrapped.programs import VOCAB, Item, Program, Runs, programs


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


def example(program: Program) -> tuple:
    return (tokens(), program.loops[0][0]) if program.asked else (tokens(),)


def wrapped(program: Program, module: Runs):
    """The program's model; a gate on other positions than the tokens' raises a doubt."""
    if not program.registers:
        return ls.wrap(module, example(program))
    with pytest.warns(UserWarning, match=r"gate gives one number for each of .* a spec takes it"):
        return ls.wrap(module, example(program))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs())
def test_a_random_program_is_mapped_back_to_itself(program):
    module = Runs(program)
    model = wrapped(program, module)
    trajectory = ls.capture(model, tokens())
    seen, found = list(module.seen.values()), model.map
    assert [u.module for u in found.prelude] == [f"pre.{i}" for i in range(program.prelude)]
    assert [u.module for u in found.coda] == [f"post.{i}" for i in range(program.coda)]
    assert len(found.loops) == len(seen)
    for loop, wanted in zip(found.loops, seen, strict=True):
        layers = [tuple(n for u in it.units for n in u.layers) for it in loop.iterations]
        assert layers == wanted.layers
        states = trajectory.loops[loop.name]
        assert all(torch.equal(a, b) for a, b in zip(states.h, wanted.h, strict=False))
        assert all(torch.equal(a, b) for a, b in zip(states.h_m, wanted.h_m, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(programs())
def test_capture_leaves_the_logits_of_a_random_program_unchanged(program):
    module = Runs(program)
    model = wrapped(program, module)
    logits = ls.capture(model, tokens(), logits=True).logits
    assert torch.equal(logits, module(*example(program)))


def test_inner_loops_of_different_length_are_one_loop():
    inner = Item("loop", (1, 3), (Item("shared"),))
    model = ls.wrap(Runs(Program(1, ((2, (inner, Item("shared"))),), 1)), tokens())
    assert [it.path for it in model.map.loops[1].iterations] == ["A0.B0", "A1.B0", "A1.B1", "A1.B2"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(programs())
def test_states_of_a_random_program_are_replaced_where_they_are_made(program):
    module = Runs(replace(program, asked=False, registers=0))
    model = ls.wrap(module, tokens())
    clean = model(tokens())
    for name in list(model.names.states)[:6]:
        entering = name.replace("hook_state", "hook_in")
        with model.hooks([(name, lambda x, hook: x.flip(-1))]):
            logits, cache = model.run_with_cache(tokens(), names_filter=entering)
        _, before = model.run_with_cache(tokens(), names_filter=[name, entering])
        assert torch.equal(before[name], before[entering])
        assert torch.equal(cache[entering], before[name].flip(-1))
        # nothing but the core reads a state of these programs
        alone = model.run_with_hooks(tokens(), fwd_hooks=[(entering, lambda x, hook: x.flip(-1))])
        assert torch.equal(logits, alone) and not torch.equal(logits, clean)
