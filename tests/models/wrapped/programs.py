"""Random programs of loops: how they run, and what a person reading them would say."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, VOCAB = 8, 13


class Block(nn.Module):
    """A layer: x + tanh(W x)."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@dataclass(frozen=True)
class Item:
    """A part of a loop's body.

    kind: `shared` (one module, called again), `alias` (the same under a second name in odd
    iterations), `tied` (a module for each iteration, parameters shared), `own` (a module for each
    iteration), `again` (the body's first shared module once more), `norm`
    (a light module, called again), `loop`.
    """

    kind: str
    counts: tuple[int, ...] = ()
    body: tuple["Item", ...] = ()


@dataclass(frozen=True)
class Program:
    """Prelude, loops one after the other, coda; each loop has a body and a number of iterations.

    head: `module`, or `function` of the embedding's weight. supervised: coda and head run in every
    iteration of the last loop. asked: forward must be given the first loop's number of iterations.
    registers: a gate looks at so many positions that are none of the tokens'.
    """

    prelude: int
    loops: tuple[tuple[int, tuple[Item, ...]], ...]
    coda: int
    seed: int = 0
    head: str = "module"
    supervised: bool = False
    asked: bool = False
    registers: int = 0


HEAVIES = tuple(Item(kind) for kind in ("shared", "alias", "tied"))
HEAVY = st.sampled_from(HEAVIES)
LIGHT = st.sampled_from(["norm", "own"]).map(Item)


@st.composite
def bodies(draw, K: int, nested: bool) -> tuple[Item, ...]:
    """A body with at least one layer that comes again in every iteration."""
    items = [draw(HEAVY)]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(items)))
        items.insert(place, draw(st.one_of(HEAVY, LIGHT)))
    if nested and draw(st.booleans()):
        counts = draw(
            st.lists(st.integers(1, 3), min_size=K, max_size=K).filter(lambda c: max(c) > 1)
        )
        inner = (Item("shared"), *([Item("shared")] if draw(st.booleans()) else []))
        items.insert(draw(st.integers(0, len(items))), Item("loop", tuple(counts), inner))
    elif items[0].kind == "shared" and sum(item in HEAVIES for item in items) > 1:
        items += [Item("again")] * draw(st.integers(0, 1))
    return tuple(items)


@st.composite
def programs(draw) -> Program:
    loops = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        K = draw(st.integers(2, 4))
        loops.append((K, draw(bodies(K, nested=True))))
    plain = all(item.kind in ("shared", "norm") for _, items in loops[:1] for item in items)
    return Program(
        prelude=draw(st.integers(0, 3)), loops=tuple(loops), coda=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 99)), head=draw(st.sampled_from(["module", "function"])),
        supervised=draw(st.booleans()), asked=plain and draw(st.booleans()),
        registers=draw(st.sampled_from([0, 0, 3])),
    )  # fmt: skip


@dataclass
class Seen:
    """One loop as it ran: layers and states of each iteration."""

    layers: list[tuple[str, ...]] = field(default_factory=list)
    h: list[Tensor] = field(default_factory=list)
    h_m: list[Tensor] = field(default_factory=list)
    shape: str = ""


class Runs(nn.Module):
    """A program as a model; each forward writes down what it did in `seen`."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(program.seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
        self.pre = nn.ModuleList(Block(generator) for _ in range(program.prelude))
        self.body, self.second = nn.ModuleDict(), nn.ModuleDict()
        for number, (K, items) in enumerate(program.loops):
            self._make(f"l{number}", K, items, generator)
        self.post = nn.ModuleList(Block(generator) for _ in range(program.coda))
        if program.head == "module":
            self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)
        if program.registers:
            self.registers = nn.Parameter(torch.randn(program.registers, WIDTH))
            self.gate = nn.Linear(WIDTH, 1)
        self.seen: dict[str, Seen] = {}

    def _make(self, prefix: str, K: int, items: tuple[Item, ...], generator) -> None:
        for place, item in enumerate(items):
            name = f"{prefix}{'abcdefgh'[place]}"
            if item.kind == "loop":
                self._make(f"{name}n", max(item.counts), item.body, generator)
            elif item.kind == "again":
                continue
            elif item.kind == "norm":
                self.body[name] = nn.LayerNorm(WIDTH)
            elif item.kind in ("own", "tied"):
                layers = nn.ModuleList(Block(generator) for _ in range(K))
                if item.kind == "tied":
                    for layer in layers[1:]:
                        layer.inner.weight = layers[0].inner.weight
                self.body[name] = layers
            else:
                self.body[name] = Block(generator)
                if item.kind == "alias":
                    self.second[name] = self.body[name]

    def forward(self, tokens: Tensor, n_loops: int | None = None) -> Tensor:
        assert n_loops is not None or not self.program.asked
        self.seen = {}
        x = self.embed(tokens)
        for layer in self.pre:
            x = layer(x)
        for number, (K, items) in enumerate(self.program.loops):
            K = n_loops or K if number == 0 else K
            last = number == len(self.program.loops) - 1
            read = self.read if last and self.program.supervised else None
            x = self._loop(f"l{number}", K, items, x, [], read)
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        for layer in self.post:
            x = layer(x)
        if self.program.head == "function":
            return F.linear(x, self.embed.weight)
        return self.unembed(x)

    def _loop(
        self,
        prefix: str,
        K: int,
        items,
        x: Tensor,
        outer: list[str],
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        seen = self.seen.setdefault(prefix, Seen())
        for t in range(K):
            layers: list[str] = []
            seen.h.append(x.detach().clone())
            for place, item in enumerate(items):
                name = f"{prefix}{'abcdefgh'[place]}"
                if item.kind == "loop":
                    x = self._loop(f"{name}n", item.counts[t], item.body, x, layers)
                    continue
                if item.kind == "norm":
                    x = self.body[name](x)
                    continue
                if item.kind == "again":
                    name = f"{prefix}a"
                if item.kind in ("own", "tied"):
                    layers.append(f"body.{name}.{t}")
                    x = self.body[name][t](x)
                    continue
                layers.append(f"body.{name}")
                again = item.kind == "alias" and t % 2
                x = (self.second if again else self.body)[name](x)
            seen.h_m.append(x.detach().clone())
            seen.layers.append(tuple(layers))
            outer += layers
            if self.program.registers and not prefix.endswith("n"):
                self.gate(self.registers.expand(len(x), -1, -1) + x.mean(1, keepdim=True))
            if read is not None and t < K - 1:
                read(x)
        return x
