"""Random programs of loops: how they run, and what a person reading them would say."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

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
    """Prelude, loops one after the other, coda; each loop has a body and a number of iterations."""

    prelude: int
    loops: tuple[tuple[int, tuple[Item, ...]], ...]
    coda: int
    seed: int = 0


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
    return Program(
        draw(st.integers(0, 3)), tuple(loops), draw(st.integers(0, 3)), draw(st.integers(0, 99))
    )


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
        self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)
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

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen = {}
        x = self.embed(tokens)
        for layer in self.pre:
            x = layer(x)
        for number, (K, items) in enumerate(self.program.loops):
            x = self._loop(f"l{number}", K, items, x, [])
        for layer in self.post:
            x = layer(x)
        return self.unembed(x)

    def _loop(self, prefix: str, K: int, items, x: Tensor, outer: list[str]) -> Tensor:
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
        return x
