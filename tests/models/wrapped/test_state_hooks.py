"""`hook_state`: a state replaced for all that reads it, the same in native models and in others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from tests.conftest import VARIANTS, make_model
from tests.models.wrapped.small import TOKENS, Block, Small
from tests.models.wrapped.test_mesh_ports import close, pair
from tests.standins.registry import LOOPED


def halve(x, hook):
    """Another state at the even tokens."""
    new = x.clone()
    new[:, ::2] = x[:, ::2].flip(-1) * 0.5
    return new


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize("query", ["prelude", "embedding"])
def test_a_patch_of_hook_state_is_the_same_in_a_port_and_in_the_native_model(query, t, tokens):
    native, model = pair(query)
    hook = [(f"loop.{t}.hook_state", halve)]
    wanted = native.run_with_hooks(tokens, fwd_hooks=hook)
    assert close(model.run_with_hooks(tokens, fwd_hooks=hook), wanted)
    core_alone = model.run_with_hooks(tokens, fwd_hooks=[(f"loop.{t}.hook_in", halve)])
    assert not close(core_alone, wanted, 1e-3)


@pytest.mark.parametrize("t", range(3))
def test_a_patch_at_the_first_layer_reaches_the_core_alone_in_both(t, tokens):
    native, model = pair()
    hook = [(f"loop.{t}.layer.0.hook_resid_pre", halve)]
    wanted = native.run_with_hooks(tokens, fwd_hooks=hook)
    first = native.config.layout.core_start(t)
    block = [(f"blocks.{first}.hook_resid_pre", halve)]
    assert torch.equal(native.run_with_hooks(tokens, fwd_hooks=block), wanted)
    assert close(model.run_with_hooks(tokens, fwd_hooks=block), wanted)
    entering = [(f"loop.{t}.hook_in", halve)]
    assert close(model.run_with_hooks(tokens, fwd_hooks=entering), wanted)
    assert not close(native.run_with_hooks(tokens, fwd_hooks=entering), wanted, 1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_patch_of_a_native_models_first_layer_leaves_its_mixing_alone(variant, tokens):
    """By hand: the core alone is the mixing of a core output that came from the patched state."""
    model = make_model(variant)
    first = model.config.layout.core_start(1)
    clean = model.run_with_cache(tokens)[1]
    _, patched = model.run_with_cache(tokens)
    with model.hooks([(f"blocks.{first}.hook_resid_pre", halve)]):
        _, patched = model.run_with_cache(tokens)
    swap = [("loop.1.hook_out", lambda x, hook: patched["loop.1.hook_out"])]
    assert torch.equal(patched["loop.1.hook_in"], clean["loop.1.hook_in"])
    with model.hooks(swap):
        _, wanted = model.run_with_cache(tokens)
    assert torch.equal(patched["coda.hook_in"], wanted["coda.hook_in"])
    assert model.aliases["loop.1.hook_state"] == "loop.1.hook_in"


class Mixed(Small):
    """h(t+1) as `mixing` says; a gate and an injection read the state too."""

    def __init__(self, mixing, **more):
        super().__init__(**more)
        self.mixing = mixing
        self.gate, self.adapter = nn.Linear(32, 1), nn.Linear(64, 32)
        self.eval()

    def loop(self, x, edit=None):
        e = x
        for t in range(self.n_loops):
            if edit is not None and edit[0] == t:
                e, x = (halve(x, None), halve(x, None)) if x is e else (e, halve(x, None))
            given = torch.cat([x, e], -1) if self.mixing == "injected" else x
            y = self.core(self.adapter(given) if self.mixing == "injected" else given)
            if self.mixing == "residual":
                x = y + x
            elif self.mixing == "anchor":
                x = y + e
            elif self.mixing == "gated":
                x = y * torch.sigmoid(self.gate(x)) + x
            elif self.mixing == "in place":
                x = y.clone()
                x += e
            elif self.mixing == "unbound":
                x, _ = torch.stack([y + x, y]).unbind(0)
            else:
                x = y
        return x


MIXINGS = ["residual", "anchor", "gated", "injected", "in place", "unbound", "base"]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("t", [0, 2])
def test_hook_state_is_an_edit_of_the_variable_in_the_models_code(mixing, t):
    module = Mixed(mixing)
    model = ls.wrap(module, TOKENS)
    assert model.K == 4
    wanted = module.rest(module.loop(module.pre(module.embed(TOKENS)), edit=(t, None)))
    hook = [(f"loop.{t}.hook_state", halve)]
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=hook), wanted)
    clean = ls.capture(model, TOKENS)
    with model.hooks(hook):
        traj = ls.capture(model, TOKENS)
    assert all(map(torch.equal, traj.h[:t], clean.h[:t]))
    assert all(map(torch.equal, traj.h_m[:t], clean.h_m[:t]))
    assert torch.equal(traj.h[t], halve(clean.h[t], None))


@pytest.mark.parametrize("case", LOOPED, ids=lambda case: case.name)
def test_every_state_of_a_stand_in_can_be_read_and_replaced_where_it_is_made(case, tokens):
    module = case.make()
    model = ls.wrap(module, tokens, spec=case.spec)
    clean = model(tokens)
    assert model.names.states
    for name in model.names.states:
        entering = name.replace("hook_state", "hook_in")
        logits, seen = model.run_with_cache(tokens, names_filter=[name, entering])
        assert torch.equal(logits, clean)
        assert torch.equal(seen[name], seen[entering])
        with model.hooks([(name, halve)]):
            _, cache = model.run_with_cache(tokens, names_filter=entering)
        assert torch.equal(cache[entering], halve(seen[name], None))


def test_the_gradient_at_a_state_is_that_of_all_its_readers():
    module = Mixed("gated")
    model = ls.wrap(module, TOKENS)
    x = module.pre(module.embed(TOKENS)).detach().requires_grad_()
    module.rest(module.loop(x)).sum().backward()
    seen = []
    with model.hooks(bwd_hooks=[("loop.0.hook_state", lambda g, hook: seen.append(g))]):
        model(TOKENS).sum().backward()
    torch.testing.assert_close(seen[0], x.grad)


class Elsewhere(Small):
    """Makes its state in another place where a text begins with token 0."""

    def loop(self, x):
        for _ in range(self.n_loops):
            x = x + self.core(x)
            if self.branches and int(TOKENS[0, 0]) != self.begins:
                x = x.cos().cos() * 2
        return x

    branches, begins = False, int(TOKENS[0, 0])


def test_a_state_that_is_made_elsewhere_on_another_input_raises_instead_of_nothing():
    module = Elsewhere()
    model = ls.wrap(module, TOKENS)
    module.branches, module.begins = True, -1
    with pytest.raises(InputError, match=r"loop\.2\.hook_state: on this input"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("loop.2.hook_state", halve)])


class Carrier(Small):
    """Hands its state on in columns of a wider tensor that it fills."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(64, 32)

    def loop(self, x):
        both = torch.cat([x, x], -1)
        for _ in range(self.n_loops):
            both[..., :32] = self.core(self.wide(both))
            both = both.clone()
        return both[..., :32]


def test_a_state_without_a_place_of_its_own_has_no_hook_state_and_inspect_says_so():
    model = ls.wrap(Carrier(), TOKENS)
    names = [it.path for it in model.map.main.iterations if it.producer is None]
    assert names and not any(f"loop.{path}.hook_state" in model.hook_dict for path in names)
    assert any("no hook_state in" in line for line in model.outline().lines())


def test_what_a_patch_reaches_is_said_for_both_kinds():
    native, model = pair()
    for lines in (native.hook_listing(), model.hook_listing(), model.outline().lines()):
        text = " ".join(lines)
        assert "core alone" in text and "all that reads it" in text and "hook_state" in text


def test_wrap_runs_the_model_as_often_as_before_and_hooks_are_gone_afterwards(tokens):
    module, count = Mixed("residual"), SimpleNamespace(n=0)
    module.register_forward_pre_hook(lambda *_: setattr(count, "n", count.n + 1))
    model = ls.wrap(module, TOKENS)
    assert count.n == 2
    clean = model(TOKENS)
    model.run_with_hooks(TOKENS, fwd_hooks=[("loop.1.hook_state", halve)])
    assert torch.equal(model(TOKENS), clean)
    assert not module.core._forward_hooks and not module.core._forward_pre_hooks


def test_predicates_mean_the_tensor_once():
    model = ls.wrap(Mixed("residual"), TOKENS)
    seen = []
    hook = (lambda name: name.startswith("loop.1."), lambda x, hook: seen.append(hook.name))
    model.run_with_hooks(TOKENS, fwd_hooks=[hook])
    assert seen and len({*seen}) == len(seen)
    assert "loop.1.hook_state" not in seen


def test_a_block_that_is_the_core_reads_its_state_through_its_own_call():
    """The core is a module within the one that loops; its state is what that one is given."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Block(32)

        def forward(self, x):
            for _ in range(3):
                x = x + self.core(x)
            return x

    class Outer(Small):
        def build(self, d):
            self.core = nn.Identity()
            self.inner = Inner()

        def loop(self, x):
            return self.inner(x)

    module = Outer()
    model = ls.wrap(module, TOKENS)
    x = module.pre(module.embed(TOKENS))
    for t in range(3):
        x = halve(x, None) if t == 1 else x
        x = x + module.inner.core(x)
    patched = model.run_with_hooks(TOKENS, fwd_hooks=[("loop.1.hook_state", halve)])
    assert torch.equal(patched, module.rest(x))
