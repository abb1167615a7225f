"""Mechanic D: a repeated core with parameters, routers or a clock of its own per loop."""

from dataclasses import dataclass

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
from tests.standins.tied import tie


class Corrected(nn.Module):
    """A block followed by a low-rank correction that depends on the iteration."""

    def __init__(self, steps, rank=2):
        super().__init__()
        self.block = Block()
        self.down = nn.ModuleList(nn.Linear(D, rank, bias=False) for _ in range(steps))
        self.up = nn.ModuleList(nn.Linear(rank, D, bias=False) for _ in range(steps))

    def forward(self, x, t: int):
        return self.block(x) + self.up[t](self.down[t](x))


class LoraPerLoop(Standin):
    """Low-rank pairs of each iteration inside the repeated modules."""

    def __init__(self, prelude=1, core=2, steps=3, coda=1, seed=20):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.prelude = blocks(prelude)
        self.core = nn.ModuleList(Corrected(steps) for _ in range(core))
        self.coda = blocks(coda)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = through(self.prelude, self.embed(tokens))
        for t in range(self.steps):
            for block in self.core:
                x = block(x, t)
        return self.unembed(self.norm(through(self.coda, x)))

    def states(self, tokens):
        h_emb = self.embed(tokens)

        def body(x, t):
            for part in self.core:
                x = part.block(x) + part.up[t](part.down[t](x))
            return x

        x, found = walk(body, through(self.prelude, h_emb), self.steps)
        h_out = through(self.coda, x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))


class Modulated(nn.Module):
    """A block whose branches are scaled by a condition, (batch, width)."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.scale = nn.Linear(D, 2 * D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        one, two = self.scale(c).unsqueeze(1).chunk(2, dim=-1)
        b = self.block
        x = x + one * b.attn(b.norm1(x))
        return x + two * b.mlp(b.norm2(x))


class Shared(nn.Module):
    """The core behind one call."""

    def __init__(self, n):
        super().__init__()
        self.blocks = nn.ModuleList(Modulated() for _ in range(n))

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


class Timed(Standin):
    """Conditioned on time: embedders of t run in the loop before the core; a list says when."""

    def __init__(self, core=2, steps=4, seed=21):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(VOCAB, D), "h": Shared(core), "norm_f": Norm()}
        )
        self.time_embedder = nn.Sequential(nn.Linear(8, D), nn.SiLU(), nn.Linear(D, D))
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.finish(seed)

    def clock(self, t: float, batch: int) -> Tensor:
        """Features of a time, (batch, 8)."""
        turns = torch.arange(1, 5) * t
        return torch.cat([turns.sin(), turns.cos()]).expand(batch, 8)

    def forward(self, idx, steps: list[float] | None = None):
        t, x = 0.0, self.transformer["wte"](idx)
        for dt in steps or [1 / self.steps] * self.steps:
            x = self.transformer["h"](x, self.time_embedder(self.clock(t, len(idx))))
            t += dt
        return self.lm_head(self.transformer["norm_f"](x)), None, x

    def states(self, tokens):
        h_emb = self.transformer["wte"](tokens)

        def body(x, t):
            c = self.time_embedder(self.clock(sum([1 / self.steps] * t), len(tokens)))
            for block in self.transformer["h"].blocks:
                x = block(x, c)
            return x

        x, found = walk(body, h_emb, self.steps)
        return States(h_emb, [found], x, self.lm_head(self.transformer["norm_f"](x)))


class NormPerLoop(Standin):
    """Each iteration begins with a norm and a scale of its own."""

    def __init__(self, prelude=1, core=2, steps=3, coda=1, seed=22):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.prelude, self.core, self.coda = blocks(prelude), blocks(core), blocks(coda)
        self.loop_norms = nn.ModuleList(Norm() for _ in range(steps))
        self.loop_scales = nn.ParameterList(torch.ones(D) for _ in range(steps))
        self.norm = nn.LayerNorm(D)
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = through(self.prelude, self.embed(tokens))
        for norm, scale in zip(self.loop_norms, self.loop_scales, strict=True):
            x = through(self.core, norm(x) * scale)
        return self.unembed(self.norm(through(self.coda, x)))

    def states(self, tokens):
        h_emb = self.embed(tokens)

        def body(x, t):
            return through(self.core, self.loop_norms[t](x) * self.loop_scales[t])

        x, found = walk(body, through(self.prelude, h_emb), len(self.loop_norms))
        h_out = through(self.coda, x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))


class MeshPort(Standin):
    """MeSH (Eqs. 2-5) on a stack of blocks: K + 1 write and read routers, the transition first.

    `early` calls an iteration's routers before its core, otherwise after it; both look at h(t).
    """

    class Inner(nn.Module):
        def __init__(self, prelude, core, coda, steps, slots):
            super().__init__()
            self.embed_tokens = nn.Embedding(VOCAB, D)
            self.layers = blocks(prelude + core + coda)
            self.norm = Norm()
            self.write_routers = nn.ModuleList(nn.Linear(D, slots) for _ in range(steps + 1))
            self.read_routers = nn.ModuleList(nn.Linear(D, slots) for _ in range(steps + 1))

    def __init__(self, prelude=1, core=2, coda=2, steps=3, early=False, seed=23):
        torch.manual_seed(seed)
        super().__init__()
        self.cut, self.slots, self.early = (prelude, core, steps), steps + 3, early
        self.model = self.Inner(prelude, core, coda, steps, self.slots)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids):
        m, (prelude, core, steps) = self.model, self.cut
        x = m.embed_tokens(input_ids)
        memory = x.new_zeros(x.shape[0], self.slots, *x.shape[1:])
        memory[:, 0] = x
        for layer in m.layers[:prelude]:
            x = layer(x)
        write, read = m.write_routers[0](x).softmax(-1), m.read_routers[0](x).softmax(-1)
        memory = memory + x.unsqueeze(1) * write.transpose(1, 2).unsqueeze(-1)
        x = (memory * read.transpose(1, 2).unsqueeze(-1)).sum(1)
        for t in range(1, steps + 1):
            given = x
            if self.early:
                write, read = m.write_routers[t](given), m.read_routers[t](given)
            for layer in m.layers[prelude : prelude + core]:
                x = layer(x)
            if not self.early:
                write, read = m.write_routers[t](given), m.read_routers[t](given)
            write, read = write.softmax(-1), read.softmax(-1)
            memory = memory + x.unsqueeze(1) * write.transpose(1, 2).unsqueeze(-1)
            x = (memory * read.transpose(1, 2).unsqueeze(-1)).sum(1)
        for layer in m.layers[prelude + core :]:
            x = layer(x)
        return self.lm_head(m.norm(x))

    def states(self, tokens):
        m, (prelude, core, steps) = self.model, self.cut
        h_emb = m.embed_tokens(tokens)
        slots = [h_emb] + [torch.zeros_like(h_emb)] * (self.slots - 1)
        memory = torch.stack(slots, dim=1)

        def cycle(memory, value, query, t):
            w, r = self.weights(query, t)
            memory = memory + value.unsqueeze(1) * w.transpose(1, 2).unsqueeze(-1)
            return memory, (memory * r.transpose(1, 2).unsqueeze(-1)).sum(1)

        x = through(m.layers[:prelude], h_emb)
        memory, h = cycle(memory, x, x, 0)
        found = Walk()
        for t in range(steps):
            found.path.append(str(t))
            found.h.append(h)
            found.h_m.append(through(m.layers[prelude : prelude + core], h))
            memory, h = cycle(memory, found.h_m[-1], h, t + 1)
        found.h.append(h)
        h_out = through(m.layers[prelude + core :], h)
        return States(h_emb, [found], h_out, self.lm_head(m.norm(h_out)))

    def weights(self, query, t):
        """Write and read weights of a cycle, (batch, pos, slot); t = 0 is the transition."""
        m = self.model
        return m.write_routers[t](query).softmax(-1), m.read_routers[t](query).softmax(-1)


@dataclass
class RoutedOutput:
    """What a recursion returns."""

    hidden_state: Tensor
    selected: Tensor | None = None


class Recursion(nn.Module):
    """Layers that run on the tokens a router picks; their result is weighted and added."""

    def __init__(self, depth, capacity):
        super().__init__()
        self.block = blocks(depth)
        self.router = nn.Linear(D, 1, bias=False)
        self.capacity = capacity

    def forward(self, x):
        weight = self.router(x).sigmoid()
        k = max(1, int(self.capacity * x.shape[1]))
        chosen = weight.topk(k, dim=1).indices.sort(dim=1).values
        part = x.gather(1, chosen.expand(-1, -1, D))
        part = through(self.block, part) * weight.gather(1, chosen)
        return RoutedOutput(x.scatter_add(1, chosen.expand(-1, -1, D), part), chosen)


class TokenRouted(Standin):
    """Recursions that share their matrices, each with a token router and norms of its own."""

    def __init__(self, depth=2, capacity=(1.0, 0.7, 0.4), seed=24):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.first, self.last = Block(), Block()
        self.recursions = nn.ModuleList(Recursion(depth, c) for c in capacity)
        for other in self.recursions[1:]:
            for copy, original in zip(other.block, self.recursions[0].block, strict=True):
                tie(copy, original, leave_out="norm")
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.first(self.embed(tokens))
        for recursion in self.recursions:
            x = recursion(x).hidden_state
        return self.unembed(self.norm(self.last(x)))

    def states(self, tokens):
        h_emb = self.embed(tokens)

        def body(x, t):
            r = self.recursions[t]
            gate = r.router(x).sigmoid()
            k = max(1, int(r.capacity * x.shape[1]))
            rows = []
            for row, weight in zip(x, gate[..., 0], strict=True):
                keep = weight.topk(k).indices.sort().values
                out = through(r.block, row[keep][None])[0] * weight[keep, None]
                rows.append(row.index_add(0, keep, out))
            return torch.stack(rows)

        x, found = walk(body, self.first(h_emb), len(self.recursions))
        h_out = self.last(x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))
