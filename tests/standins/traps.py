"""What goes wrong elsewhere: forms of calls, results and loops that a tool must take."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tests.standins.blocks import VOCAB, Block, D, Norm, Standin, States, blocks, through, walk


class Plain(Standin):
    """A stack without a loop."""

    def __init__(self, layers=5, seed=30):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = blocks(layers)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        h_out = through(self.layers, h_emb)
        return States(h_emb, [], h_out, self.unembed(self.norm(h_out)))


@dataclass
class Result:
    """A block's result as a dataclass."""

    hidden_states: Tensor
    spread: Tensor


class Named(NamedTuple):
    """A block's result as a named tuple."""

    hidden_states: Tensor
    spread: Tensor


class Wrapped(nn.Module):
    """A block behind a keyword, whose result has a certain form."""

    FORMS: ClassVar = {
        "tensor": lambda x, s: x,
        "tuple": lambda x, s: (x, s),
        "list": lambda x, s: [x, s],
        "dict": lambda x, s: {"hidden_states": x, "spread": s},
        "dataclass": Result,
        "named": Named,
    }

    def __init__(self, form):
        super().__init__()
        self.block, self.form = Block(), form

    def forward(self, *, hidden_states: Tensor, mask: Tensor | None = None):
        x = self.block(hidden_states)
        return self.FORMS[self.form](x, x.std())


def stream(result) -> Tensor:
    """The stream in a block's result."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, dict):
        return result["hidden_states"]
    return result[0] if isinstance(result, tuple | list) else result.hidden_states


class Formed(Standin):
    """A looped model whose blocks take keywords and return results of some form."""

    def __init__(self, form="tuple", prelude=1, core=2, coda=1, steps=3, seed=31):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.prelude = nn.ModuleList(Wrapped(form) for _ in range(prelude))
        self.core = nn.ModuleList(Wrapped(form) for _ in range(core))
        self.coda = nn.ModuleList(Wrapped(form) for _ in range(coda))
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x, seen = self.embed(tokens), []
        for part in [self.prelude, *[self.core] * self.steps, self.coda]:
            for block in part:
                result = block(hidden_states=x, mask=None)
                seen.append(type(result).__name__)
                x = stream(result)
        return {"logits": self.unembed(self.norm(x)), "forms": tuple(seen)}

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(
            lambda x, _: through([b.block for b in self.core], x),
            through([b.block for b in self.prelude], h_emb),
            self.steps,
        )
        h_out = through([b.block for b in self.coda], x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))


class Adaptive(Standin):
    """The number of steps depends on the tokens: one more than the first token modulo 3."""

    def __init__(self, core=2, seed=32):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.start, self.core = Block(), blocks(core)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def steps(self, tokens) -> int:
        """How often the core runs on these tokens."""
        return 2 + int(tokens[0, 0]) % 3

    def forward(self, tokens):
        x = self.start(self.embed(tokens))
        for _ in range(self.steps(tokens)):
            x = through(self.core, x)
        return self.unembed(self.norm(x))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(lambda x, _: through(self.core, x), self.start(h_emb), self.steps(tokens))
        return States(h_emb, [found], x, self.unembed(self.norm(x)))


class Halting(Standin):
    """ACT: each sample runs until it halts by itself, a batch until all have, masked."""

    def __init__(self, core=2, most=5, seed=38):
        torch.manual_seed(seed)
        super().__init__()
        self.most = most
        self.embed = nn.Embedding(VOCAB, D)
        self.start, self.core = Block(), blocks(core)
        self.halt = nn.Linear(D, 1)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def steps(self, tokens) -> Tensor:
        """How often the core runs on each sample."""
        return 2 + tokens[:, 0] % (self.most - 1)

    def forward(self, tokens):
        x, needed = self.start(self.embed(tokens)), self.steps(tokens)
        t = 0
        while bool((t < needed).any()):
            runs = (t < needed)[:, None, None]
            x = torch.where(runs, through(self.core, x), x)
            self.halt(x)
            t += 1
        return self.unembed(self.norm(x))

    def states(self, tokens):
        """Of samples that all run equally often."""
        h_emb = self.embed(tokens)
        steps = int(self.steps(tokens).max())
        x, found = walk(lambda x, _: through(self.core, x), self.start(h_emb), steps)
        return States(h_emb, [found], x, self.unembed(self.norm(x)))


class Failing(Standin):
    """The forward fails in its second layer."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Linear(D + 1, D)

        def forward(self, x):
            return self.matrix(x)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList([Block(), self.Broken()])
        self.finish(0)

    def forward(self, tokens):
        return through(self.layers, self.embed(tokens))


class Encoder(Standin):
    """Each token sees all others; a loop over two blocks, no unembedding."""

    def __init__(self, core=2, steps=3, seed=33):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.start = Block(causal=False)
        self.core = blocks(core, causal=False)
        self.pooler = nn.Linear(D, D)
        self.finish(seed)

    def forward(self, tokens):
        x = self.start(self.embed(tokens))
        for _ in range(self.steps):
            x = through(self.core, x)
        return {"last_hidden_state": x, "pooled": self.pooler(x[:, 0]).tanh()}

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(lambda x, _: through(self.core, x), self.start(h_emb), self.steps)
        return States(h_emb, [found], x, x)


class Partial(Standin):
    """An adapter between iterations only: C I C I C."""

    def __init__(self, core=2, steps=3, seed=34):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.core, self.between = blocks(core), nn.Linear(D, D)
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = through(self.core, self.embed(tokens))
        for _ in range(self.steps - 1):
            x = through(self.core, self.between(x))
        return self.unembed(self.norm(x))

    def states(self, tokens):
        """Each iteration but the last ends with what stands between it and the next."""
        h_emb = self.embed(tokens)

        def body(x, t):
            x = through(self.core, x)
            return self.between(x) if t < self.steps - 1 else x

        x, found = walk(body, h_emb, self.steps)
        return States(h_emb, [found], x, self.unembed(self.norm(x)))


class TwiceLinear(Standin):
    """Each layer calls one of its matrices twice: no loop."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.mix = Block(), nn.Linear(D, D)

        def forward(self, x):
            x = x + self.mix(x).tanh()
            x = self.block(x)
            return x + self.mix(x).tanh()

    def __init__(self, layers=3, seed=35):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(self.Layer() for _ in range(layers))
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        return self.unembed(self.norm(through(self.layers, self.embed(tokens))))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        h_out = through(self.layers, h_emb)
        return States(h_emb, [], h_out, self.unembed(self.norm(h_out)))


class TwoStreams(nn.Module):
    """A block that keeps its last branch apart from the residual: the state is their sum."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        b = self.block
        residual = residual + b.attn(b.norm1(residual))
        return b.mlp(b.norm2(residual)), residual


class Fused(Standin):
    """Blocks hand on (branch, residual); a norm adds them up after every loop."""

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, hidden, residual):
            return self.norm(hidden + residual)

    def __init__(self, core=2, steps=3, seed=36):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(TwoStreams() for _ in range(core))
        self.norm = self.Add()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(self.steps):
            residual = None
            for layer in self.layers:
                x, residual = layer(x, residual)
            x = self.norm(x, residual)
        return self.unembed(x)

    def states(self, tokens):
        h_emb = self.embed(tokens)

        def body(x, t):
            for layer in self.layers:
                b = layer.block
                x = x + b.attn(b.norm1(x))
                x, r = b.mlp(b.norm2(x)), x
                x = x + r
            return self.norm.norm(x)

        x, found = walk(body, h_emb, self.steps)
        return States(h_emb, [found], x, self.unembed(x))


class Chained(Standin):
    """Prelude, core and coda are `nn.Sequential`s, each behind one call."""

    def __init__(self, prelude=2, core=3, coda=1, steps=2, seed=37):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.prelude = nn.Sequential(*blocks(prelude))
        self.core = nn.Sequential(*blocks(core))
        self.coda = nn.Sequential(*blocks(coda))
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.prelude(self.embed(tokens))
        for _ in range(self.steps):
            x = self.core(x)
        return self.unembed(self.norm(self.coda(x)))

    def states(self, tokens):
        h_emb = self.embed(tokens)
        x, found = walk(
            lambda x, _: through(self.core, x), through(self.prelude, h_emb), self.steps
        )
        h_out = through(self.coda, x)
        return States(h_emb, [found], h_out, self.unembed(self.norm(h_out)))
