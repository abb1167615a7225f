"""Models whose samples are no tokens: in-context regression, and puzzles with a carried state."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.standins.blocks import VOCAB, Block, D, blocks


class Regression(nn.Module):
    """In-context regression with floats (xs, ys); the core is given its input again (injection)."""

    def __init__(self, steps=3, seed=70):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.read_in = nn.Linear(3, D)
        self.first, self.core, self.last = Block(), blocks(2), Block()
        self.read_out = nn.Linear(D, 1)
        self.eval()

    def embedded(self, xs: Tensor, ys: Tensor) -> Tensor:
        before = ys.roll(1, 1)[..., None] * (torch.arange(ys.shape[1]) > 0)[:, None]
        return self.first(self.read_in(torch.cat([xs, before], -1)))

    def forward(self, xs, ys):
        e = self.embedded(xs, ys)
        h = e
        for _ in range(self.steps):
            h = h + e
            for block in self.core:
                h = block(h)
        return self.read_out(self.last(h))[..., 0]

    def read(self, h: Tensor) -> Tensor:
        """What it predicts if h(K) were h."""
        return self.read_out(self.last(h))[..., 0]


@dataclass
class Carry:
    """What a puzzle's solver carries from one call to the next."""

    state: Tensor
    steps: Tensor


class Solver(nn.Module):
    """A puzzle in a dict of inputs and labels, with a carry as a dataclass; grids of integers."""

    def __init__(self, steps=3, seed=71):
        torch.manual_seed(seed)
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(VOCAB, D)
        self.core = blocks(2, causal=False)
        self.unembed = nn.Linear(D, VOCAB)
        self.eval()

    def forward(self, carry: Carry, batch: dict[str, Tensor]):
        e = self.embed(batch["inputs"].flatten(1))
        h = carry.state
        for _ in range(self.steps):
            h = h + e
            for block in self.core:
                h = block(h)
        return Carry(h, carry.steps + 1), {"logits": self.unembed(h)}
