"""Loops that carry two states, a fast and a slow one; `seen` holds both as the code has them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tests.standins.blocks import VOCAB, Block, D, Norm, Standin, blocks, through


@dataclass
class Course:
    """What a state was before and after each iteration."""

    h: list[Tensor] = field(default_factory=list)
    h_m: list[Tensor] = field(default_factory=list)


class TwoStates(Standin):
    """Embedding and head; what is between is a loop of two states, written down as it runs."""

    seen: dict[str, Course]

    def __init__(self, seed=60):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.norm, self.head = Norm(), nn.Linear(D, VOCAB)
        self.begin(seed)
        self.finish(seed)

    def begin(self, seed: int) -> None:
        """Make the modules of the loop and the initial states."""
        self.y_first = nn.Parameter(torch.randn(D))
        self.z_first = nn.Parameter(torch.randn(D))

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        """Write down one update of a state."""
        course = self.seen.setdefault(name, Course())
        course.h.append(before.detach().expand_as(after).clone())
        course.h_m.append(after.detach().clone())

    def forward(self, tokens):
        self.seen = {}
        return self.head(self.norm(self.loop(self.embed(tokens))))


class OneModule(TwoStates):
    """for H: {for L: z = net(z + y + x); y = net(y + z)}: one module updates both."""

    def __init__(self, high=2, low=2, seed=60):
        self.high, self.low = high, low
        super().__init__(seed)

    def begin(self, seed):
        super().begin(seed)
        self.net = Block()

    def loop(self, x):
        y, z = self.y_first, self.z_first
        for _ in range(self.high):
            y_before, z_before = y, z
            for _ in range(self.low):
                before, z = z, self.net(z + y + x)
                self.note("inner", before, z)
            y = self.net(y + z)
            self.note("y", y_before, y)
            self.note("z", z_before, z)
        return y


class Injected(nn.Module):
    """Blocks that are given their state, and what is added to it, apart."""

    def __init__(self, n=2):
        super().__init__()
        self.layers = blocks(n)

    def forward(self, hidden_states, injection):
        return through(self.layers, hidden_states + injection)


class Injecting(OneModule):
    """As `OneModule`, but the module adds the other state itself; the first states are given."""

    def begin(self, seed):
        super().begin(seed)
        self.net = Injected()

    def loop(self, x):
        y = self.y_first.expand_as(x)
        z = self.z_first.expand_as(x)
        for _ in range(self.high):
            y_before, z_before = y, z
            for _ in range(self.low):
                before, z = z, self.net(z, y + x)
                self.note("inner", before, z)
            y = self.net(y, z)
            self.note("y", y_before, y)
            self.note("z", z_before, z)
        return y


class TwoModules(OneModule):
    """for H: {for L: z_L = L(z_L + z_H + x); z_H = H(z_H + z_L)}, mostly without gradients."""

    def begin(self, seed):
        super().begin(seed)
        self.L_level, self.H_level = Injected(2), Injected(1)

    def loop(self, x):
        z_H = self.y_first.expand_as(x)
        z_L = self.z_first.expand_as(x)
        steps = self.high * self.low
        for i in range(self.high):
            y_before, z_before = z_H, z_L
            for j in range(self.low):
                last = i * self.low + j == steps - 1
                with torch.set_grad_enabled(torch.is_grad_enabled() and last):
                    before, z_L = z_L, self.L_level(z_L, z_H + x)
                self.note("inner", before, z_L)
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == self.high - 1):
                z_H = self.H_level(z_H, z_L)
            self.note("y", y_before, z_H)
            self.note("z", z_before, z_L)
        return z_H


class ByTurns(TwoStates):
    """for K: {z = f(z + y + x); y = g(y + z)}: two states and no inner loop."""

    def __init__(self, steps=3, seed=61):
        self.steps = steps
        super().__init__(seed)

    def begin(self, seed):
        super().begin(seed)
        self.f, self.g = Block(), Block()

    def loop(self, x):
        y, z = x, self.z_first
        for _ in range(self.steps):
            before, z = z, self.f(z + y + x)
            self.note("z", before, z)
            before, y = y, self.g(y + z)
            self.note("y", before, y)
        return y


@dataclass
class Carry:
    """What a segment hands on to the next."""

    z_H: Tensor
    z_L: Tensor


class Cycles(nn.Module):
    """One segment: H cycles of L cycles, the logits of it, and whether to go on."""

    def __init__(self, high, low, note):
        super().__init__()
        self.high, self.low = high, low
        self.note = note
        self.embed = nn.Embedding(VOCAB, D)
        self.L_level, self.H_level = Injected(2), Injected(1)
        self.lm_head, self.q_head = nn.Linear(D, VOCAB, bias=False), nn.Linear(D, 2)

    def forward(self, carry, tokens):
        x = self.embed(tokens)
        z_H, z_L = carry.z_H, carry.z_L
        for _ in range(self.high):
            for _ in range(self.low):
                before, z_L = z_L, self.L_level(z_L, z_H + x)
                self.note("L", before, z_L)
            before, z_H = z_H, self.H_level(z_H, z_L)
            self.note("H", before, z_H)
        carry = replace(carry, z_H=z_H.detach(), z_L=z_L.detach())
        return carry, self.lm_head(z_H), self.q_head(z_H[:, 0])


class Segments(Standin):
    """for S: for H: {for L: …}: segments of adaptive computing time around both cycles."""

    seen: dict[str, Course]

    def __init__(self, segments=3, high=2, low=2, seed=62):
        torch.manual_seed(seed)
        super().__init__()
        self.segments = segments
        self.inner = Cycles(high, low, self.note)
        self.H_init, self.L_init = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.finish(seed)

    note = TwoStates.note

    def forward(self, tokens):
        self.seen = {}
        shape = (*tokens.shape, D)
        carry = Carry(self.H_init.expand(shape), self.L_init.expand(shape))
        for _ in range(self.segments):
            before = carry
            carry, logits, _ = self.inner(carry, tokens)
            self.note("segment z_H", before.z_H, carry.z_H)
            self.note("segment z_L", before.z_L, carry.z_L)
        return logits
