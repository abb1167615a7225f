"""Mechanics B and C: distinct modules share parameters, one module has several names."""

from types import SimpleNamespace

import torch
from torch import nn

from tests.standins.blocks import VOCAB, Block, D, Norm, Standin, States, blocks, through, walk


def tie(copy: nn.Module, original: nn.Module, *, leave_out: str = "-") -> None:
    """Let a module use another one's parameters, all but those whose name holds a word."""
    for name, parameter in original.named_parameters():
        if leave_out not in name:
            owner, _, last = name.rpartition(".")
            setattr(copy.get_submodule(owner), last, parameter)


class TiedStack(Standin):
    """Distinct modules, each called once; those in the middle share all but what is their own."""

    def __init__(self, prelude=1, core=2, steps=3, coda=2, own="-", seed=10):
        torch.manual_seed(seed)
        super().__init__()
        self.cut = (prelude, core, steps)
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(prelude + core * steps + coda)
        for i in range(core, core * steps):
            tie(self.layers[prelude + i], self.layers[prelude + i % core], leave_out=own)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        prelude, core, steps = self.cut
        h_emb = self.embed(tokens)

        def body(x, t):
            return through(self.layers[prelude + t * core : prelude + (t + 1) * core], x)

        x, found = walk(body, through(self.layers[:prelude], h_emb), steps)
        h_out = through(self.layers[prelude + core * steps :], x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))


class LowRank(nn.Module):
    """A shared matrix and a small correction of its own."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Relaxed(Standin):
    """Distinct modules share most matrices; each corrects them with a low-rank pair of its own."""

    def __init__(self, core=2, steps=3, seed=11):
        torch.manual_seed(seed)
        super().__init__()
        self.cut = (core, steps)
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(core * steps)
        for i in range(core, core * steps):
            tie(self.layers[i], self.layers[i % core])
        for layer in self.layers:
            for part, name in [(layer.attn, "qkv"), (layer.attn, "out"), (layer.mlp, "up")]:
                setattr(part, name, LowRank(getattr(part, name)))
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        core, steps = self.cut
        h_emb = self.embed(tokens)
        x, found = walk(
            lambda x, t: through(self.layers[t * core : (t + 1) * core], x), h_emb, steps
        )
        return States(h_emb, [found], x, self.unembed(self.norm(x)))


class TiedHead(Standin):
    """A plain stack whose unembedding is the embedding: nothing is run twice."""

    def __init__(self, layers=3, seed=12):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(layers)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB, bias=False)
        self.unembed.weight = self.embed.weight
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        h_out = through(self.layers, h_emb)
        return States(h_emb, [], h_out, self.unembed(self.norm(h_out)))


class Aliased(Standin):
    """A stack whose layers are registered a second time under the names of their roles."""

    class Inner(nn.Module):
        def __init__(self, prelude, core, coda, steps):
            super().__init__()
            self.loop_config = SimpleNamespace(num_rec=steps)
            self.embed_tokens = nn.Embedding(VOCAB, D)
            self.layers = blocks(prelude + core + coda)
            self.norm = Norm()
            self.prelude = nn.ModuleList(self.layers[:prelude])
            self.rec_block = nn.ModuleList(self.layers[prelude : prelude + core])
            self.coda = nn.ModuleList(self.layers[prelude + core :])

        def forward(self, input_ids):
            x = through(self.prelude, self.embed_tokens(input_ids))
            for _ in range(self.loop_config.num_rec):
                x = through(self.rec_block, x)
            return self.norm(through(self.coda, x))

    def __init__(self, prelude=2, core=2, coda=1, steps=3, seed=13):
        torch.manual_seed(seed)
        super().__init__()
        self.cut = (prelude, core)
        self.model = self.Inner(prelude, core, coda, steps)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.finish(seed)

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids))

    def states(self, tokens, steps=None):
        m, (prelude, core) = self.model, self.cut
        h_emb = m.embed_tokens(tokens)
        middle = m.layers[prelude : prelude + core]
        x, found = walk(
            lambda x, _: through(middle, x),
            through(m.layers[:prelude], h_emb),
            steps or m.loop_config.num_rec,
        )
        h_out = through(m.layers[prelude + core :], x)
        return States(h_emb, [found], h_out, self.lm_head(m.norm(h_out)))


class SharedRelu(Standin):
    """An activation and a dropout shared by all layers: no loop."""

    class Layer(nn.Module):
        def __init__(self, act, drop):
            super().__init__()
            self.block, self.up, self.down = Block(), nn.Linear(D, D), nn.Linear(D, D)
            self.act, self.drop = act, drop

        def forward(self, x):
            x = self.block(x)
            return x + self.drop(self.down(self.act(self.up(x))))

    def __init__(self, layers=4, seed=14):
        torch.manual_seed(seed)
        super().__init__()
        act, drop = nn.PReLU(), nn.Dropout(0.1)
        self.act, self.drop = act, drop
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(self.Layer(act, drop) for _ in range(layers))
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        h_out = through(self.layers, h_emb)
        return States(h_emb, [], h_out, self.unembed(self.norm(h_out)))
