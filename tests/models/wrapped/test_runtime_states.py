"""What is kept is what the model had at that time: in place, under hooks, without patterns."""

import torch
from torch import nn

import loopscope as ls
from tests.models.wrapped.real import llama
from tests.models.wrapped.small import TOKENS, Small, same, seen


class Injected(Small):
    """x += e after each call of the core."""

    def loop(self, x):
        e = x
        for _ in range(self.n_loops):
            x = self.core(x)
            x += e
        return x


class Buffered(Small):
    """One buffer that each iteration adds to."""

    def loop(self, x):
        x = x.clone()
        for _ in range(self.n_loops):
            x += 0.5 * self.core(x)
        return x


class Rectified(Small):
    """A core with an activation that writes into its input."""

    def build(self, d):
        parts = nn.Linear(d, 4 * d), nn.ReLU(inplace=True), nn.Linear(4 * d, d)
        self.core = nn.Sequential(*parts)


def test_states_that_the_model_changes_later_are_kept_as_they_were():
    for make in (Injected, Buffered):
        module = make()
        model = ls.wrap(module, TOKENS)
        states = ls.capture(model, TOKENS)
        assert same(states.h_m, seen(module, "core", "out")), make
        assert same(states.h[:-1], seen(module, "core", "in")), make


def test_a_cache_of_what_the_model_changes_later_holds_what_was_there():
    module = Rectified()
    with torch.no_grad():
        _, cache = ls.wrap(module, TOKENS).run_with_cache(TOKENS)
    wanted = seen(module, "core.0", "out")
    assert same([cache[f"loop.{t}.core.0.hook_out"] for t in range(4)], wanted)
    module = Buffered()
    with torch.no_grad():
        _, cache = ls.wrap(module, TOKENS).run_with_cache(TOKENS)
    wanted = seen(module, "core", "in")
    assert same([cache[f"loop.{t}.core.hook_in"] for t in range(4)], wanted)


def test_capture_runs_the_hooks_that_were_added_to_stay():
    module = Small()
    model = ls.wrap(module, TOKENS)
    model.add_hook("loop.1.core.hook_out", lambda x, hook: x * 0.5)
    states = ls.capture(model, TOKENS, logits=True)
    calls, plain = [], Small()

    def halve(m, args, result):
        calls.append(result * 0.5 if len(calls) == 1 else result)
        return calls[-1]

    handle = plain.core.register_forward_hook(halve)
    with torch.no_grad():
        wanted = plain(TOKENS)
    handle.remove()
    assert same(states.h_m, calls) and torch.equal(states.logits, wanted)
    assert torch.equal(model(TOKENS), wanted)
    assert torch.equal(model.with_loops(4)(TOKENS), plain(TOKENS))  # a view starts without hooks


def test_an_unfiltered_cache_changes_no_attention():
    module = llama()
    model = ls.wrap(module, TOKENS)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(logits, module(TOKENS, use_cache=False).logits)
    assert not [name for name in cache if name.endswith("hook_pattern")]
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_pattern")
    assert cache["pattern", 0].shape == (2, 4, 8, 8)
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "pattern" in name)
    assert len(cache) == model.cfg.n_layers
