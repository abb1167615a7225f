"""Mechanic A: the same module is called again and again."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.standins.blocks import (
    VOCAB,
    Block,
    D,
    Norm,
    Standin,
    States,
    Walk,
    blocks,
    through,
    walk,
)


@dataclass
class Latents:
    """What `Depth` returns: a dataclass whose first field is no stream."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    latents: Tensor | None = None


class Depth(Standin):
    """Random initial state, injection of the prelude's output by an adapter, a norm used twice."""

    def __init__(self, prelude=2, core=3, coda=1, steps=4, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.mean_steps = steps
        self.trunk = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "prelude": blocks(prelude),
                "adapter": nn.Linear(2 * D, D),
                "core_block": blocks(core),
                "coda": blocks(coda),
                "ln_f": Norm(),
            }
        )
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids, num_steps: int | None = None, input_states=None):
        trunk = self.trunk
        e = trunk["wte"](input_ids) * D**0.5
        for block in trunk["prelude"]:
            e = block(e)
        x = torch.randn_like(e) if input_states is None else input_states.clone()
        for _ in range(self.mean_steps if num_steps is None else num_steps):
            x = trunk["adapter"](torch.cat([x, e], dim=-1))
            for block in trunk["core_block"]:
                x = block(x)
        latents = trunk["ln_f"](x)
        x = latents
        for block in trunk["coda"]:
            x = block(x)
        logits = self.lm_head(trunk["ln_f"](x)).float()
        return Latents(torch.as_tensor(0.0), logits, latents.detach())

    def states(self, tokens, start=None, steps=None):
        trunk = self.trunk
        h_emb = trunk["wte"](tokens) * D**0.5
        e = through(trunk["prelude"], h_emb)

        def body(x, t):
            return through(trunk["core_block"], trunk["adapter"](torch.cat([x, e], dim=-1)))

        x, found = walk(body, start, steps or self.mean_steps)
        h_out = through(trunk["coda"], trunk["ln_f"](x))
        return States(h_emb, [found], h_out, self.lm_head(trunk["ln_f"](h_out)).float())


class Gated(Standin):
    """Norm inside the loop, an exit gate each iteration; the inner model returns a tuple."""

    class Inner(nn.Module):
        def __init__(self, layers, steps):
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, D)
            self.layers = blocks(layers)
            self.norm = Norm()
            self.early_exit_gate = nn.Linear(D, 1)
            self.total_ut_steps = steps

        def forward(self, input_ids):
            x = self.embed_tokens(input_ids)
            every, gates = [], []
            for _ in range(self.total_ut_steps):
                for layer in self.layers:
                    x = layer(x)
                x = self.norm(x)
                every.append(x)
                gates.append(self.early_exit_gate(x))
            return x, every, gates

    def __init__(self, layers=3, steps=4, seed=1):
        torch.manual_seed(seed)
        super().__init__()
        self.model = self.Inner(layers, steps)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids):
        x, _, gates = self.model(input_ids)
        return {"logits": self.lm_head(x), "gates": gates}

    def states(self, tokens, steps=None):
        m = self.model
        h_emb = m.embed_tokens(tokens)
        steps = steps or m.total_ut_steps
        x, found = walk(lambda x, t: m.norm(through(m.layers, x)), h_emb, steps)
        return States(h_emb, [found], x, self.lm_head(x))

    def gates(self, tokens):
        """The probability of leaving after each iteration."""
        found = self.states(tokens).loops[0]
        return [self.model.early_exit_gate(x).sigmoid()[..., 0] for x in found.h_m]


class NanoFork(Standin):
    """The loop stands in the forward of a nanoGPT-like model; its config says how often."""

    def __init__(self, n_prelude=1, n_block=2, n_loop=3, seed=2):
        torch.manual_seed(seed)
        super().__init__()
        self.config = SimpleNamespace(n_loop=n_loop, n_embd=D, vocab_size=VOCAB)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "wpe": nn.Embedding(64, D),
                "drop": nn.Dropout(0.1),
                "start": blocks(n_prelude),
                "h": blocks(n_block),
                "ln_f": nn.LayerNorm(D),
            }
        )
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, idx, targets=None):
        t = self.transformer
        x = t["drop"](t["wte"](idx) + t["wpe"](torch.arange(idx.shape[1])))
        for block in t["start"]:
            x = block(x)
        for _ in range(self.config.n_loop):
            for block in t["h"]:
                x = block(x)
        return self.lm_head(t["ln_f"](x)), None

    def states(self, tokens, steps=None):
        t = self.transformer
        h_emb = t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1]))
        steps = steps or self.config.n_loop
        x, found = walk(lambda x, _: through(t["h"], x), through(t["start"], h_emb), steps)
        return States(h_emb, [found], x, self.lm_head(t["ln_f"](x)))


class Stack(nn.Module):
    """A list of layers behind one call, whose input comes by keyword."""

    def __init__(self, n):
        super().__init__()
        self.layers = blocks(n)

    def forward(self, hidden_states, scale=None):
        return through(self.layers, hidden_states)


class TwoClocks(Standin):
    """(L L L H) (L L L H): two states; all but the last L of each round run without gradients."""

    def __init__(self, low=2, high=1, low_cycles=3, high_cycles=2, seed=3):
        torch.manual_seed(seed)
        super().__init__()
        self.low_cycles, self.high_cycles = low_cycles, high_cycles
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(VOCAB, D),
                "L_module": Stack(low),
                "H_module": Stack(high),
                "norm": Norm(),
            }
        )
        self.start_low = nn.Parameter(torch.randn(D))
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids):
        m = self.model
        high = m["embed_tokens"](input_ids)
        low = self.start_low.expand_as(high)
        for _ in range(self.high_cycles):
            for i in range(self.low_cycles):
                with torch.set_grad_enabled(torch.is_grad_enabled() and i == self.low_cycles - 1):
                    low = m["L_module"](hidden_states=low + high)
            high = m["H_module"](hidden_states=high + low)
        return self.lm_head(m["norm"](high))

    def states(self, tokens):
        m = self.model
        h_emb = high = m["embed_tokens"](tokens)
        low = self.start_low.expand_as(high)
        outer, inner = Walk(), Walk()
        for h in range(self.high_cycles):
            outer.h.append(high)
            outer.path.append(f"H{h}")
            for i in range(self.low_cycles):
                inner.h.append(low)
                low = m["L_module"].layers[0](low + high)
                low = through(m["L_module"].layers[1:], low)
                inner.h_m.append(low)
                inner.path.append(f"H{h}.L{i}")
            high = through(m["H_module"].layers, high + low)
            outer.h_m.append(high)
        inner.h.append(low)
        outer.h.append(high)
        return States(h_emb, [outer, inner], high, self.lm_head(m["norm"](high)))


class LayerMajor(Standin):
    """Each layer runs three times before the next one: A A A B B B."""

    def __init__(self, layers=2, times=3, seed=4):
        torch.manual_seed(seed)
        super().__init__()
        self.times = times
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(layers)
        self.last = Block()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            for _ in range(self.times):
                x = layer(x)
        return self.unembed(self.norm(self.last(x)))

    def states(self, tokens):
        h_emb = x = self.embed(tokens)
        found = []
        for name, layer in zip("ABCD", self.layers, strict=False):
            x, one = walk(lambda x, _, layer=layer: layer(x), x, self.times)
            one.path = [f"{name}{t}" for t in range(self.times)]
            found.append(one)
        h_out = self.last(x)
        return States(h_emb, found, h_out, self.unembed(self.norm(h_out)))


class Cycle(nn.Module):
    """A repeated module that repeats one of its own."""

    def __init__(self, times):
        super().__init__()
        self.first, self.body, self.last = Block(), Block(), Block()
        self.times = times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = self.body(x)
        return self.last(x)


class CycleInCycle(Standin):
    """The outer loop calls one module, in whose forward the inner loop stands."""

    def __init__(self, outer=3, inner=2, seed=5):
        torch.manual_seed(seed)
        super().__init__()
        self.outer = outer
        self.embed = nn.Embedding(VOCAB, D)
        self.before, self.cycle, self.after = Block(), Cycle(inner), Block()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.before(self.embed(tokens))
        for _ in range(self.outer):
            x = self.cycle(x)
        return self.unembed(self.norm(self.after(x)))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x = self.before(h_emb)
        outer, inner = Walk(), Walk()
        c = self.cycle
        for _ in range(self.outer):
            outer.h.append(x)
            x = c.first(x)
            for _ in range(c.times):
                inner.h.append(x)
                x = c.body(x)
                inner.h_m.append(x)
            inner.h.append(x)
            x = c.last(x)
            outer.h_m.append(x)
        outer.h.append(x)
        starts = c.times + 1  # after each run of the inner loop, what entered c.last was noted too
        inner.h = [h for i, h in enumerate(inner.h[:-1]) if i % starts != c.times] + inner.h[-1:]
        h_out = self.after(x)
        return States(h_emb, [outer, inner], h_out, self.unembed(self.norm(h_out)))


class Interleaved(Standin):
    """One shared block between blocks that run once: x0 S x1 S x2 S x3."""

    def __init__(self, times=3, seed=6):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(times + 1)
        self.shared = Block()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.layers[0](self.embed(tokens))
        for layer in self.layers[1:]:
            x = layer(self.shared(x))
        return self.unembed(self.norm(x))

    def states(self, tokens):
        h_emb = self.embed(tokens)

        def body(x, t):
            return self.layers[t + 1](self.shared(x))

        x, found = walk(body, self.layers[0](h_emb), len(self.layers) - 1)
        return States(h_emb, [found], x, self.unembed(self.norm(x)))
