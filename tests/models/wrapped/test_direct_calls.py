"""Hooks act when somebody else calls the original; where they cannot, that is said."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.by_hand import by_hand, change, first, hooks_on
from tests.models.wrapped.programs import VOCAB, Runs, programs
from tests.models.wrapped.small import TOKENS, Small
from tests.standins.registry import CASES

PATCH = ("loop.1.core.a.hook_out", lambda x, hook: change(x))
MAKE = {case.name: case.make for case in CASES}
WAYS = ("context", "add", "point")


@pytest.fixture(autouse=True)
def _compiler_is_reset():
    yield
    torch.compiler.reset()


def ask(model, way, hook):
    """Ask for a hook in one of the ways there are, until `reset_hooks`."""
    if way == "add":
        model.add_hook(*hook)
    elif way == "point":
        model.hook_dict[model.canonical(hook[0])].add_hook(hook[1])
    else:
        context = model.hooks(fwd_hooks=[hook])
        context.__enter__()
        return lambda: context.__exit__(None, None, None)
    return model.reset_hooks


def logits(result):
    """The logits in what a stand-in returns."""
    return first(result) if not hasattr(result, "logits") else result.logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "part", "call", "address"),
    [
        ("gated", "model.layers.1", 2, "loop.2.model.layers.1.hook_out"),
        ("depth", "trunk.core_block.0", 1, "loop.1.trunk.core_block.0.hook_out"),
        ("two_clocks", "model.L_module.layers.0", 4, "loop.H1.L1.model.L_module.layers.0.hook_out"),
        ("tied_stack", "layers.3", 0, "loop.1.layers.3.hook_out"),
    ],
)
def test_the_original_called_directly_has_the_hooks_of_its_wrapped_model(
    name, part, call, address, way
):
    module = MAKE[name]()
    model = ls.wrap(module, TOKENS)
    torch.manual_seed(3)
    clean = logits(module(TOKENS))
    torch.manual_seed(3)
    with by_hand(module, part, call, "out"):
        wanted = logits(module(TOKENS))
    reset = ask(model, way, (address, lambda x, hook: change(x)))
    torch.manual_seed(3)
    given = logits(module(TOKENS))
    reset()
    assert torch.equal(given, wanted) and not torch.equal(given, clean)
    torch.manual_seed(3)
    assert torch.equal(logits(module(TOKENS)), clean)
    assert hooks_on(module) == 0 and "forward" not in vars(module)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(programs(), strategies.data())
@torch.no_grad()
def test_hooks_act_in_direct_calls_and_generation_of_random_programs(program, data):
    module = Runs(replace(program, asked=False, registers=0))
    tokens = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    model = ls.wrap(module, tokens)
    loop = data.draw(strategies.sampled_from(model.map.loops))
    iteration = data.draw(strategies.sampled_from(loop.iterations))
    port = iteration.h_m
    with by_hand(module, port.module, port.call, port.side):
        wanted, longer = module(tokens), tokens
    for _ in range(3):
        with by_hand(module, port.module, port.call, port.side):
            chosen = module(longer)[:, -1].argmax(-1, keepdim=True)
        longer = torch.cat([longer, chosen], dim=1)
    with model.hooks(fwd_hooks=[(f"loop.{iteration.path}.hook_out", lambda x, hook: change(x))]):
        assert torch.equal(module(tokens), wanted)
        assert torch.equal(model.generate(tokens, 3), longer)
    assert hooks_on(module) == 0 and not torch.equal(module(tokens), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_sees_each_pass_once_whoever_calls(way):
    module = Small()
    model, seen = ls.wrap(module, TOKENS), []
    reset = ask(model, way, ("loop.1.hook_out", lambda x, hook: seen.append(x.detach().clone())))
    clean = Small()(TOKENS)
    assert torch.equal(model(TOKENS), clean) and len(seen) == 1
    assert torch.equal(module(TOKENS), clean) and len(seen) == 2
    assert torch.equal(module.forward(TOKENS), clean) and len(seen) == 3
    ls.capture(model, TOKENS), model.run_with_cache(TOKENS)
    assert len(seen) == 5 and all(torch.equal(x, seen[0]) for x in seen)
    other = model.with_loops(2)  # hooks are not those of other views, nor of wrapping
    other(TOKENS), ls.capture(other, TOKENS), ls.wrap(module, TOKENS)
    assert len(seen) == 5
    reset()
    module(TOKENS)
    assert len(seen) == 5 and hooks_on(module) == 0


def test_gradients_flow_and_backward_hooks_fire_in_a_direct_call():
    module = Small()
    model, seen = ls.wrap(module, TOKENS), []
    name = "loop.1.core.hook_out"
    with model.hooks(bwd_hooks=[(name, lambda g, hook: seen.append(g.clone()))]):
        model(TOKENS).sum().backward()
        module(TOKENS).sum().backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_a_direct_call_has_the_number_of_iterations_that_its_hooks_are_named_for():
    module = Small(4)
    longer = ls.wrap(module, TOKENS).with_loops(6)
    hook = ("loop.5.core.hook_out", lambda x, hook: change(x))
    wanted = longer.run_with_hooks(TOKENS, fwd_hooks=[hook])
    with longer.hooks(fwd_hooks=[hook]):
        assert torch.equal(module(TOKENS), wanted)
    assert torch.equal(module(TOKENS), Small(4)(TOKENS))
    requested = MAKE["depth"]()
    longer = ls.wrap(requested, TOKENS).with_loops(6)
    seen = []
    with longer.hooks(fwd_hooks=[("loop.5.hook_out", lambda x, hook: seen.append(1))]):
        requested(TOKENS)
        with pytest.raises(InputError, match="was called 3 times, 6 on the example"):
            requested(TOKENS, num_steps=3)
    assert seen == [1]


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("kind", ["in place", "around", "part"])
@pytest.mark.parametrize("way", ["context", "add"])
@torch.no_grad()
def test_hooks_act_in_direct_calls_of_compiled_originals(kind, when, way):
    module = Small()
    wanted = ls.wrap(Small(), TOKENS).run_with_hooks(TOKENS, fwd_hooks=[PATCH])
    model = ls.wrap(module, TOKENS)
    reset = ask(model, way, PATCH) if when == "while" else None
    called = module
    if kind == "in place":
        module.compile(backend="eager")
    elif kind == "around":
        called = torch.compile(module, backend="eager")
    else:
        module.core.compile(backend="eager")
    if reset is None:
        called(TOKENS), called(TOKENS)
        reset = ask(model, way, PATCH)
    assert torch.equal(called(TOKENS), wanted) and torch.equal(called(TOKENS), wanted)
    assert torch.equal(model(TOKENS), wanted)
    reset()
    assert torch.equal(called(TOKENS), Small()(TOKENS))
    assert (module._compiled_call_impl is not None) == (kind == "in place")


def test_hooks_act_in_the_original_within_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        module = Small()
        model, around = ls.wrap(module, TOKENS), nn.parallel.DistributedDataParallel(module)
        wanted = model.run_with_hooks(TOKENS, fwd_hooks=[PATCH])
        with model.hooks(fwd_hooks=[PATCH]):
            assert torch.equal(around(TOKENS), wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_a_part_called_by_itself_warns_that_its_hooks_saw_nothing(way):
    module = Small()
    model, seen = ls.wrap(module, TOKENS), []
    reset = ask(model, way, ("loop.2.hook_out", lambda x, hook: seen.append(1)))
    x = module.embed(TOKENS)  # no hook was asked for here
    with pytest.warns(UserWarning, match="^core was called outside a forward pass"):
        module.core(x)
    reset()
    module.core(x)
    assert seen == [] and hooks_on(module) == 0


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_after_a_direct_call_that_fails(way):
    module = Small()
    model = ls.wrap(module, TOKENS)

    def fail(x, hook):
        raise KeyboardInterrupt

    reset = ask(model, way, ("loop.1.core.hook_out", fail))
    for call in (module, module, model):
        with pytest.raises(KeyboardInterrupt):
            call(TOKENS)
    reset()
    assert hooks_on(module) == 0 and "forward" not in vars(module)
    assert torch.equal(model(TOKENS), Small()(TOKENS))


def test_the_original_run_in_its_own_hook_says_so():
    module = Small()
    model = ls.wrap(module, TOKENS)
    for again in (model, module):
        model.add_hook("loop.1.hook_out", lambda x, hook, again=again: again(TOKENS) and None)
        with pytest.raises(InputError, match="runs the model that it is a hook of"):
            module(TOKENS)
        model.reset_hooks()
    assert torch.equal(module(TOKENS), model(TOKENS))


def test_hooks_of_two_wrapped_models_of_one_module_act_both():
    module = Small()
    one, two = ls.wrap(module, TOKENS), ls.wrap(module, TOKENS)
    both = [PATCH, ("loop.2.core.b.hook_out", lambda x, hook: x * 2)]
    wanted = one.run_with_hooks(TOKENS, fwd_hooks=both)
    one.add_hook(*both[0])
    with two.hooks(fwd_hooks=both[1:]):
        assert torch.equal(module(TOKENS), wanted)
        one.reset_hooks()
        assert torch.equal(module(TOKENS), two(TOKENS))
    assert "forward" not in vars(module)
    assert torch.equal(module(TOKENS), Small()(TOKENS))
    longer = one.with_loops(6)
    one.add_hook(*PATCH)
    with (
        longer.hooks(fwd_hooks=[PATCH]),
        pytest.raises(InputError, match="was called 6 times, 4 on the example"),
    ):
        module(TOKENS)
    one.reset_hooks()
    assert hooks_on(module) == 0 and "forward" not in vars(module)


def test_hooks_that_are_taken_off_leave_others_in_force():
    module = Small()
    model, seen = ls.wrap(module, TOKENS), []
    model.add_hook("loop.0.hook_out", lambda x, hook: seen.append(0))
    model.add_hook("loop.2.core.hook_in", lambda x, hook: seen.append(2), is_permanent=True)
    with model.hooks(fwd_hooks=[("loop.1.hook_out", lambda x, hook: seen.append(1))]):
        module(TOKENS)
    module(TOKENS)
    model.reset_hooks()
    module(TOKENS)
    assert seen == [0, 1, 2, 0, 2, 2]
    model.reset_hooks(including_permanent=True)
    assert hooks_on(module) == 0 and "forward" not in vars(module)


def test_a_forward_that_was_put_in_place_stays_before_and_after():
    module = Small()
    plain, calls = module.forward, []

    def counted(tokens):
        calls.append(1)
        return plain(tokens)

    module.forward = counted
    model = ls.wrap(module, TOKENS)
    calls.clear()
    with model.hooks(fwd_hooks=[PATCH]):
        patched = module(TOKENS)
    assert len(calls) == 1 and module.forward is counted
    model.add_hook(*PATCH)
    around = module.forward
    module.forward = lambda tokens: around(tokens)  # later than the hooks
    assert torch.equal(module(TOKENS), patched)
    model.reset_hooks()
    assert torch.equal(module(TOKENS), Small()(TOKENS))
    model.add_hook(*PATCH)
    assert torch.equal(module(TOKENS), patched) and torch.equal(model(TOKENS), patched)


def test_copies_made_while_there_are_hooks_have_hooks_of_their_own():
    model = ls.wrap(Small(), TOKENS)
    model.add_hook("loop.1.hook_out", double)
    wanted = model(TOKENS)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        with torch.no_grad():
            for parameter in twin.module.parameters():
                parameter.mul_(0.5)
        assert torch.equal(twin.module(TOKENS), twin(TOKENS))
        twin.reset_hooks()
        assert hooks_on(twin.module) == 0 and torch.equal(twin.module(TOKENS), twin(TOKENS))
        assert torch.equal(model.module(TOKENS), wanted)


def double(x, hook):
    """A hook that can be pickled."""
    return 2 * x


def test_a_wrapped_model_is_freed_with_its_hooks():
    model = ls.wrap(Small(), TOKENS)
    model.run_with_cache(TOKENS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
