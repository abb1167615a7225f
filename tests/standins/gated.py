"""Loops whose gates look at other positions than the tokens': registers, routed parts."""

import torch
from torch import nn

from tests.models.wrapped.small import Block, Small


class Gated(Small):
    """A gate in each iteration, on `where`.

    `registers` (three tokens of its own before the text), `first` (one number per text), `routed`
    (the k tokens with the largest norm), `flat` (these in one axis), `ragged` (those with a
    positive first element, in one axis), `wide` (four numbers per token). `prefix` lets the state
    itself have three more positions, which the gate looks at.
    """

    def __init__(self, where, **more):
        super().__init__(**more)
        self.where = where
        self.exit_gate = nn.Linear(32, 4 if where == "wide" else 1)
        self.registers = nn.Parameter(torch.randn(3, 32))
        self.given: list[torch.Tensor] = []
        self.eval()

    def looked_at(self, x):
        if self.where == "registers":
            return self.registers + x.mean(1, keepdim=True)
        if self.where == "first":
            return x[:, 0]
        if self.where in ("routed", "flat"):
            chosen = x.norm(dim=-1).topk(3, dim=1).indices.sort(1).values
            part = x.gather(1, chosen[..., None].expand(-1, -1, 32))
            return part if self.where == "routed" else part.flatten(0, 1)
        if self.where == "ragged":
            return x[x[..., 0] > 0]
        return x

    def loop(self, x):
        self.given = []
        for _ in range(self.n_loops):
            self.given.append(self.exit_gate(self.looked_at(x)))
            x = self.core(x)
        return x


class Prefixed(Gated):
    """The state has three registers before the text; the coda takes the text alone."""

    def __init__(self, **more):
        super().__init__("prefix", **more)

    def loop(self, x):
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        return super().loop(x)[:, 3:]


class Chosen(Small):
    """A gate within a module of several parts, which only a spec can name."""

    def build(self, d):
        self.gate = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
        self.pool = Block(d)

    def loop(self, x):
        for _ in range(self.n_loops):
            self.gate(x[:, ::2])
            x = self.core(x)
        return x
