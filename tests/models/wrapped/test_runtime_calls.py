"""Modules that are called on some inputs only; iterations that other inputs have."""

import pytest
import torch
from torch import nn

import loopscope as ls
from loopscope.errors import InputError
from tests.models.wrapped.small import TOKENS, Small, same, seen

EVEN, ODD = TOKENS.clone(), TOKENS.clone()
EVEN[0, 0], ODD[0, 0] = 0, 1


class Branching(Small):
    """A further layer in every other iteration; the first token says in which."""

    def build(self, d):
        self.ex = nn.Linear(d, d)

    def loop(self, x):
        for t in range(self.n_loops):
            x = self.core(x)
            if (t + self.flip) % 2 == 0:
                x = x + self.ex(x)
        return x

    def forward(self, tokens):
        self.flip = int(tokens[0, 0] % 2)
        return super().forward(tokens)


class Experts(Small):
    """Each token goes through one of four experts, so some run on no token."""

    def build(self, d):
        self.router = nn.Linear(d, 4)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(4))

    def loop(self, x):
        for _ in range(self.n_loops):
            x = self.core(x)
            flat = x.flatten(0, 1)
            chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                if (mine := (chosen == i).nonzero()[:, 0]).numel():
                    out[mine] = expert(flat[mine])
            x = x + out.view_as(x)
        return x


class Counted(Small):
    """As many iterations as the first token says."""

    def forward(self, tokens):
        self.n_loops = int(tokens[0, 0]) + 2
        return super().forward(tokens)


def test_a_module_is_addressed_in_its_own_iteration_whatever_ran_before():
    module = Branching()
    model = ls.wrap(module, EVEN, spec={"state": {"output": "core"}})
    assert [n for n in model.hook_dict if n.endswith("ex.hook_in")] == [
        "loop.0.ex.hook_in", "loop.2.ex.hook_in",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"did not call what loop\.0\.ex\.hook_in"):
        _, cache = model.run_with_cache(ODD)
    assert "loop.0.ex.hook_in" not in cache and "loop.2.ex.hook_out" not in cache
    wanted = seen(module, "core", "out", ODD)
    assert same([cache[f"loop.{t}.core.hook_out"] for t in range(4)], wanted)
    assert same(ls.capture(model, ODD).h_m, wanted)
    with pytest.warns(UserWarning, match="saw nothing"):  # a patch of what does not run
        out = model.run_with_hooks(ODD, fwd_hooks=[("loop.0.ex.hook_out", lambda x, hook: x * 0)])
    assert torch.equal(out, module(ODD))


def _by_expert(module, tokens):
    """What each expert gives in each iteration, by torch hooks, and the logits."""
    found: dict[str, torch.Tensor] = {}
    begun: list[int] = []
    handles = [module.core.register_forward_pre_hook(lambda m, a: begun.append(1))]
    for i, expert in enumerate(module.experts):

        def note(m, args, result, i=i):
            found[f"loop.{len(begun) - 1}.experts.{i}.hook_out"] = result.clone()

        handles.append(expert.register_forward_hook(note))
    with torch.no_grad():
        wanted = module(tokens)
    for handle in handles:
        handle.remove()
    return found, wanted


def test_experts_that_get_no_token_leave_the_others_in_their_iterations():
    module = Experts()
    model = ls.wrap(module, TOKENS)
    others = [torch.randint(50, (b, 8), generator=torch.Generator().manual_seed(b)) for b in (1, 3)]
    for tokens in others:
        hit, wanted = _by_expert(module, tokens)
        names = [n for n in model.hook_dict if "experts" in n and n.endswith("hook_out")]
        with pytest.warns() if set(names) - set(hit) else torch.no_grad():
            out, cache = model.run_with_cache(tokens)
        assert torch.equal(out, wanted)
        for name in names:
            assert (name in cache) == (name in hit)
            assert name not in hit or torch.equal(cache[name], hit[name])
        assert same(ls.capture(model, tokens).h_m, seen(module, "core", "out", tokens))


def test_another_number_of_iterations_is_refused_only_where_iterations_are_read():
    module = Counted()
    two, three = TOKENS.clone(), TOKENS.clone()
    two[0, 0], three[0, 0] = 0, 1
    model = ls.wrap(module, three)
    for read in (ls.capture, lambda m, t: m.run_with_cache(t)):
        with pytest.raises(InputError, match="loops as often as its input asks for"):
            read(model, two)
    _, cache = model.run_with_cache(two, names_filter=["hook_h_out"])
    assert torch.equal(cache["hook_h_out"], seen(module, "norm", "in", two)[0])


def test_a_loop_that_is_not_entered_has_its_own_message():
    class Skipping(Small):
        def forward(self, tokens):
            x = self.pre(self.embed(tokens))
            return self.rest(x if tokens[0, 0] == 0 else self.loop(x))

    model = ls.wrap(Skipping(), ODD)
    with pytest.raises(InputError, match="compiled or scripted code calls no hooks"):
        ls.capture(model, EVEN)


def test_a_state_that_this_input_does_not_reach_cannot_be_captured():
    model = ls.wrap(Branching(), EVEN)  # whose raw output is that of ex where it runs
    assert ls.capture(model, EVEN).K == 4
    with pytest.raises(InputError, match="a state is missing"):
        ls.capture(model, ODD)


def test_a_model_run_in_its_own_hook_says_so():
    module = Small()
    model, other = ls.wrap(module, TOKENS), ls.wrap(module, TOKENS)
    hook = ("loop.2.hook_out", lambda x, hook: other(TOKENS) and x)
    with pytest.raises(InputError, match="runs the model that it is a hook of"):
        model.run_with_hooks(TOKENS, fwd_hooks=[hook])
    assert torch.equal(model(TOKENS), module(TOKENS))  # and it runs again afterwards


@pytest.mark.parametrize("when", ["before", "after", "wrapper", "part", "method"])
def test_hooks_act_in_models_that_are_compiled_before_or_after(when):
    module = Small()
    patch = [("loop.1.core.a.hook_out", lambda x, hook: x * 0)]
    wanted = ls.wrap(Small(), TOKENS).run_with_hooks(TOKENS, fwd_hooks=patch)
    if when == "before":
        module.compile(backend="eager")
    model = ls.wrap(module, TOKENS)
    if when == "after":
        module.compile(backend="eager")
    if when == "wrapper":
        model.compile(backend="eager")
    if when == "part":
        module.core.compile(backend="eager")
    if when == "method":
        module.loop = torch.compile(module.loop, backend="eager")
    with torch.no_grad():
        model(TOKENS), model(TOKENS)
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=patch), wanted)
    assert ls.capture(model, TOKENS).K == 4
