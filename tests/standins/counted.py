"""How often loops run: by an argument that must be given, by configurations, on three levels."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.standins.blocks import VOCAB, Block, D, Norm, Standin, States, Walk, walk


@dataclass(frozen=True)
class Cycles:
    """Loops within a segment, in a configuration that cannot be changed."""

    H_cycles: int = 2
    L_cycles: int = 3


@dataclass(frozen=True)
class Settings:
    """What the segments' stand-in reads its numbers from."""

    halt_max_steps: int = 2
    warmup_steps: int = 3
    arch: Cycles = field(default_factory=Cycles)


class Segments(Standin):
    """Segments of an outer loop, slow cycles in each, fast ones in each of those."""

    def __init__(self, settings=None, seed=21):
        torch.manual_seed(seed)
        super().__init__()
        self.settings = Settings() if settings is None else settings
        self.embed = nn.Embedding(VOCAB, D)
        self.start, self.H_level, self.L_level = Block(), Block(), Block()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(self.settings.halt_max_steps):
            x = self.start(x)
            for _ in range(self.settings.arch.H_cycles):
                for _ in range(self.settings.arch.L_cycles):
                    x = self.L_level(x)
                x = self.H_level(x)
        return self.unembed(self.norm(x))

    def states(self, tokens, counts=None):
        settings = self.settings
        segments, high, low = counts or (
            settings.halt_max_steps, settings.arch.H_cycles, settings.arch.L_cycles,
        )  # fmt: skip
        h_emb = x = self.embed(tokens)
        outer, middle, inner = Walk(), Walk(), Walk()
        for a in range(segments):
            outer.h.append(x)
            x = self.start(x)
            for h in range(high):
                middle.h.append(x)
                middle.path.append(f"start{a}.H{h}")
                for i in range(low):
                    inner.h.append(x)
                    x = self.L_level(x)
                    inner.h_m.append(x)
                    inner.path.append(f"start{a}.H{h}.L{i}")
                after_inner = x
                x = self.H_level(x)
                middle.h_m.append(x)
            outer.h_m.append(x)
            outer.path.append(f"start{a}")
        for loop, last in ((outer, x), (middle, x), (inner, after_inner)):
            loop.h.append(last)
        return States(h_emb, [outer, middle, inner], x, self.unembed(self.norm(x)))


class Asked(Standin):
    """The number of iterations is an argument without a default."""

    def __init__(self, seed=22):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.first, self.core = Block(), Block()
        self.norm = Norm()
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens: Tensor, n_loops: int) -> Tensor:
        x = self.first(self.embed(tokens))
        for _ in range(n_loops):
            x = self.core(x)
        return self.unembed(self.norm(x))

    def states(self, tokens, steps=4):
        h_emb = self.embed(tokens)
        x, loop = walk(lambda x, t: self.core(x), self.first(h_emb), steps)
        return States(h_emb, [loop], x, self.unembed(self.norm(x)))


class Tower(Standin):
    """Loops in loops, outermost first; whoever makes it says where the numbers stand.

    Args:
        levels: How many loops.
        count: Gives the number of iterations of a level.
    """

    def __init__(self, levels, count, seed=23):
        torch.manual_seed(seed)
        super().__init__()
        self.levels, self.count = levels, count
        self.embed = nn.Embedding(VOCAB, D)
        self.parts = nn.ModuleDict({f"{name}_level": Block() for name in "XYZ"[:levels]})
        self.unembed = nn.Linear(D, VOCAB)
        self.finish(seed)

    def forward(self, tokens, **numbers):
        return self.unembed(self._level(0, self.embed(tokens), numbers))

    def _level(self, level, x, numbers):
        for _ in range(self.count(self, level, numbers)):
            x = self.parts[f"{'XYZ'[level]}_level"](x)
            if level + 1 < self.levels:
                x = self._level(level + 1, x, numbers)
        return x
