"""Mechanic A with something injected into each iteration, and unusual arguments of forward."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Recurring(Standin):
    """The prelude's output comes first in the concatenation, the state second; a norm ends each
    iteration, and all but the last ones are detached."""

    def __init__(self, prelude=1, core=2, coda=1, steps=4, keep=2, seed=40):
        torch.manual_seed(seed)
        super().__init__()
        self.steps, self.keep = steps, keep
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "prelude": blocks(prelude),
                "recur": blocks(core),
                "coda": blocks(coda),
            }
        )
        self.inject = nn.Linear(2 * D, D, bias=False)
        self.norm_emb, self.norm_recur, self.norm_final = Norm(), Norm(), Norm()
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, idx, targets=None, num_recur: int | None = None):
        t = self.transformer
        e = through(t["prelude"], self.norm_emb(t["wte"](idx)))
        steps, s = self.steps if num_recur is None else num_recur, e
        for i in range(steps):
            u = through(t["recur"], self.inject(torch.cat([e, s], dim=-1)))
            s = self.norm_recur(u)
            s = s.detach() if i < steps - self.keep else s
        logits = self.lm_head(self.norm_final(through(t["coda"], s)))
        return 15 * torch.tanh(logits / 15), s

    def states(self, tokens, steps=None):
        t = self.transformer
        h_emb = self.norm_emb(t["wte"](tokens))
        e = through(t["prelude"], h_emb)

        def body(s, _):
            return self.norm_recur(through(t["recur"], self.inject(torch.cat([e, s], dim=-1))))

        s, found = walk(body, e, steps or self.steps)
        h_out = through(t["coda"], s)
        logits = self.lm_head(self.norm_final(h_out))
        return States(h_emb, [found], h_out, 15 * torch.tanh(logits / 15))


class Diagonal(nn.Module):
    """Decay of the state plus a linear map of what is injected; bare parameters."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(D))
        self.B = nn.Parameter(torch.eye(D))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return x * torch.exp(-F.softplus(self.decay)) + e @ self.B.T


class Valued(nn.Module):
    """A block that is also given an embedding of the tokens."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, *, ve: Tensor | None = None) -> Tensor:
        return self.block(x if ve is None else x + ve)


class Driven(Standin):
    """An adapter with two arguments, embeddings looked up in each iteration, a matrix after the
    loop, a random start, and logits only where they are asked for."""

    def __init__(self, prelude=1, core=2, coda=1, steps=3, seed=41):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, D),
                "prelude": nn.ModuleList(Valued() for _ in range(prelude)),
                "adapter": Diagonal(),
                "core_block": nn.ModuleList(Valued() for _ in range(core)),
                "C": nn.Linear(D, D),
                "coda": nn.ModuleList(Valued() for _ in range(coda)),
                "ln_f": Norm(),
            }
        )
        self.value_embeds = nn.ModuleDict(
            {"0": nn.Embedding(VOCAB, D), "2": nn.Embedding(VOCAB, D)}
        )
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids, return_logits=False, start=None):
        t, ve = self.transformer, self.value_embeds
        e = t["wte"](input_ids)
        for block in t["prelude"]:
            e = block(e, ve=ve["0"](input_ids))
        x = torch.randn_like(e) if start is None else start
        for _ in range(self.steps):
            x = t["adapter"](x, e)
            for i, block in enumerate(t["core_block"]):
                x = block(x, ve=ve["2"](input_ids) if i == 1 else None)
        x = t["C"](x)
        for block in t["coda"]:
            x = block(x)
        logits = self.lm_head(t["ln_f"](x))
        return {"loss": torch.tensor(0.0), "logits": logits if return_logits else None}

    def states(self, tokens, start=None):
        t, ve = self.transformer, self.value_embeds
        h_emb = t["wte"](tokens)
        e = t["prelude"][0].block(h_emb + ve["0"](tokens))

        def body(x, _):
            x = t["core_block"][0].block(t["adapter"](x, e))
            return t["core_block"][1].block(x + ve["2"](tokens))

        x, found = walk(body, start, self.steps)
        h_out = t["coda"][0].block(t["C"](x))
        return States(h_emb, [found], h_out, self.lm_head(t["ln_f"](h_out)))


@dataclass
class Carry:
    """What a call hands on to the next."""

    high: Tensor
    low: Tensor


class Adding(nn.Module):
    """A stack that adds its second argument to its first."""

    def __init__(self, n):
        super().__init__()
        self.layers = blocks(n, causal=False)

    def forward(self, hidden_states, injection, **more):
        return through(self.layers, hidden_states + injection)


class Carried(Standin):
    """Two states that are handed over in a dataclass, tokens in a dict; the sums are made inside
    the stacks; all but the very last round runs without gradients."""

    def __init__(self, low=2, high=3, low_cycles=2, high_cycles=2, seed=42):
        torch.manual_seed(seed)
        super().__init__()
        self.low_cycles, self.high_cycles = low_cycles, high_cycles
        self.embed_tokens = nn.Embedding(VOCAB, D)
        self.H_level, self.L_level = Adding(high), Adding(low)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.q_head = nn.Linear(D, 2)
        self.finish(seed)

    def forward(self, carry: Carry, batch: dict[str, Tensor]):
        x = self.embed_tokens(batch["inputs"])
        high, low = carry.high, carry.low
        last = self.low_cycles * self.high_cycles - 1
        with torch.no_grad():
            for i in range(last + 1):
                if i < last:
                    low = self.L_level(low, high + x)
                    if (i + 1) % self.low_cycles == 0:
                        high = self.H_level(high, low)
        low = self.L_level(low, high + x)
        high = self.H_level(high, low)
        logits = self.lm_head(high)
        return Carry(high.detach(), low.detach()), {"logits": logits, "q": self.q_head(high[:, 0])}

    def states(self, tokens, carry):
        h_emb = self.embed_tokens(tokens)
        high, low, outer, inner = carry.high, carry.low, Walk(), Walk()
        for _ in range(self.high_cycles):
            outer.h.append(high)
            for _ in range(self.low_cycles):
                inner.h.append(low)
                low = through(self.L_level.layers, low + (high + h_emb))
                inner.h_m.append(low)
            inner_after, high = low, through(self.H_level.layers, high + low)
            outer.h_m.append(high)
        inner.h.append(inner_after)
        outer.h.append(high)
        return States(h_emb, [outer, inner], high, self.lm_head(high))
