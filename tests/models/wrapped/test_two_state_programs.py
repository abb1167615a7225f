"""Random loops of two states, however they are written, are mapped back to their states."""

from dataclasses import dataclass

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import loopscope as ls
from tests.models.wrapped.programs import VOCAB, WIDTH, Block
from tests.standins.two_states import Course


@dataclass(frozen=True)
class Program:
    """How a loop of a slow state y and a fast state z is written.

    modules: `one` updates both, or `two`. adds: `code` gives the sum to the module, `module` is
    given the parts. first: which state is updated first in a cycle. begin: what the states begin
    with. supervised: the head runs in each cycle. gradients: whether all cycles have them.
    """

    high: int
    low: int
    modules: str
    adds: str
    first: str
    begin: tuple[str, str]
    injected: bool
    supervised: bool
    gradients: bool
    detached: bool
    prelude: int
    coda: int
    seed: int


@st.composite
def programs(draw) -> Program:
    forms = st.sampled_from(["vector", "zeros", "expanded", "input"])
    first = draw(st.sampled_from(["z", "z", "y"]))
    begin = (draw(forms), draw(forms))
    if first == "y" and begin == ("vector", "vector"):  # nothing there has positions
        begin = ("vector", "expanded")
    modules, low = draw(st.sampled_from(["one", "two"])), draw(st.integers(1, 3))
    injected = draw(st.booleans()) or "input" not in begin
    if modules == "one" and low == 1:  # else each call reads the last two values: one state
        injected = True
    return Program(
        high=draw(st.integers(2, 4)), low=low,
        modules=modules,
        adds=draw(st.sampled_from(["code", "module"])),
        first=first,
        begin=begin, injected=injected,
        supervised=draw(st.booleans()), gradients=draw(st.booleans()),
        detached=draw(st.booleans()), prelude=draw(st.integers(0, 2)),
        coda=draw(st.integers(0, 2)), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


class Adding(nn.Module):
    """A layer that is given its state and what is added to it."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.layer = Block(generator)

    def forward(self, state: Tensor, *others: Tensor) -> Tensor:
        return self.layer(sum(others, state))


class Runs(nn.Module):
    """A program as a model; each forward writes down what it did in `seen`."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(program.seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.pre = nn.ModuleList(Block(generator) for _ in range(program.prelude))
        self.slow = Adding(generator)
        self.fast = self.slow if program.modules == "one" else Adding(generator)
        self.post = nn.ModuleList(Block(generator) for _ in range(program.coda))
        self.start = nn.Parameter(torch.randn(2, WIDTH, generator=generator))
        self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)
        self.seen: dict[str, Course] = {}

    def begin(self, form: str, number: int, x: Tensor) -> Tensor:
        if form == "input":
            return x
        if form == "zeros":
            return torch.zeros_like(x)
        return self.start[number] if form == "vector" else self.start[number].expand_as(x)

    def update(self, module: Adding, *parts: Tensor) -> Tensor:
        if self.program.adds == "module":
            return module(*parts)
        return module(sum(parts[1:], parts[0]))

    def note(self, name: str, before: Tensor, after: Tensor) -> None:
        course = self.seen.setdefault(name, Course())
        course.h.append(before.detach().expand_as(after).clone())
        course.h_m.append(after.detach().clone())

    def forward(self, tokens: Tensor) -> list[Tensor]:
        self.seen, every = {}, []
        program, x = self.program, self.embed(tokens)
        for layer in self.pre:
            x = layer(x)
        y = self.begin(program.begin[0], 0, x)
        z = self.begin(program.begin[1], 1, x)
        extra = [x] if program.injected else []
        for i in range(program.high):
            last = i == program.high - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and (program.gradients or last)):
                old_y, old_z = y, z
                if program.first == "y":
                    y = self.update(self.slow, y, z)
                for _ in range(program.low):
                    old, z = z, self.update(self.fast, z, y, *extra)
                    self.note("inner", old, z)
                if program.first == "z":
                    y = self.update(self.slow, y, z)
                self.note("y", old_y, y)
                self.note("z", old_z, z)
            if program.detached:
                y, z = y.detach(), z.detach()
            if program.supervised:
                every.append(self.read(y + z if program.first == "y" else y))
        return every[-1:] or [self.read(y + z if program.first == "y" else y)]

    def read(self, x: Tensor) -> Tensor:
        for layer in self.post:
            x = layer(x)
        return self.unembed(x)


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(programs())
def test_the_states_of_a_random_program_are_shown_as_themselves(program):
    module = Runs(program)
    model = ls.wrap(module, tokens())
    trajectory = ls.capture(model, tokens())
    counts = [program.high, *([program.high * program.low] if program.low > 1 else [])]
    assert [*model.loops.values()] == counts
    if program.coda:
        assert [u.module for u in model.map.coda] == [f"post.{i}" for i in range(program.coda)]
    assert set(trajectory.named) == {"y", "z"}
    shown = {name: trajectory.named[name] for name in "yz"}
    if program.low > 1:
        [shown["inner"]] = trajectory.others.values()
    for name, states in shown.items():
        course = module.seen[name]
        same = [torch.equal(a, b) for a, b in zip(states.h[:-1], course.h, strict=True)]
        assert all(same), (name, same)
        same = [torch.equal(a, b) for a, b in zip(states.h_m, course.h_m, strict=True)]
        assert all(same), (name, same)
        assert torch.equal(states.h[-1], course.h_m[-1])
