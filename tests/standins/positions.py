"""Models whose states have other positions than their tokens: latents, routed subsets, pooling."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.standins.blocks import VOCAB, Block, D, Norm, Standin, States, blocks, through, walk


class Reader(nn.Module):
    """Cross-attention: states of some positions read those of others."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D)

    def forward(self, x, source):
        return x + F.scaled_dot_product_attention(
            self.query(x), self.key(source), self.value(source)
        )


class Latents(Standin):
    """Perceiver-like: latents read the tokens, loop among themselves, and are read at the end."""

    def __init__(self, latents=4, core=2, steps=3, seed=60):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.start = Block()
        self.latents = nn.Parameter(torch.randn(latents, D))
        self.enter = Reader()
        self.core = blocks(core, causal=False)
        self.leave = Reader()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.start(self.embed(tokens))
        z = self.enter(self.latents.expand(len(tokens), -1, -1), x)
        for _ in range(self.steps):
            z = through(self.core, z)
        return self.unembed(self.norm(self.leave(x, z)))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x = self.start(h_emb)
        z = self.enter(self.latents.expand(len(tokens), -1, -1), x)
        z, found = walk(lambda z, _: through(self.core, z), z, self.steps)
        h_out = self.leave(x, z)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))


class Subset(Standin):
    """Mixture of depths: each iteration runs on its own tokens, fewer from one to the next."""

    def __init__(self, capacity=(1.0, 0.7, 0.4), core=2, seed=61):
        torch.manual_seed(seed)
        super().__init__()
        self.capacity = capacity
        self.embed = nn.Embedding(VOCAB, D)
        self.start, self.last = Block(), Block()
        self.core = blocks(core)
        self.scores = nn.Linear(D, 1)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def kept(self, x, capacity):
        """Places of the tokens that an iteration runs on, (batch, k, D)."""
        k = max(1, int(capacity * x.shape[1]))
        chosen = self.scores(x)[..., 0].topk(k).indices.sort().values
        return chosen[..., None].expand(-1, -1, D)

    def forward(self, tokens):
        x = self.start(self.embed(tokens))
        for capacity in self.capacity:
            kept = self.kept(x, capacity)
            x = x.scatter(1, kept, through(self.core, x.gather(1, kept)))
        return self.unembed(self.norm(self.last(x)))


class Pooled(Standin):
    """Funnel-like: one block, run on states that are pooled to half their length in between."""

    def __init__(self, core=2, steps=3, seed=62):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.core = blocks(core)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def between(self, x):
        """Every second position: none looks ahead."""
        return x[:, ::2]

    def forward(self, tokens):
        x = self.embed(tokens)
        pos = x.shape[1]
        for t in range(self.steps):
            x = through(self.core, x if t == 0 else self.between(x))
        x = x.repeat_interleave(2 ** (self.steps - 1), dim=1)[:, :pos]
        return self.unembed(self.norm(x))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(
            lambda x, t: through(self.core, x if t == 0 else self.between(x)), h_emb, self.steps
        )
        found.h[1:-1] = [self.between(h) for h in found.h_m[:-1]]
        found.h[-1] = x = x.repeat_interleave(2 ** (self.steps - 1), dim=1)[:, : tokens.shape[1]]
        return States(h_emb, [found], x, self.unembed(self.norm(x)))
