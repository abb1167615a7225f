"""The state is told from what stands beside it; heads, experts and other shapes are no loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loopscope as ls
from loopscope.errors import InputError

D, V = 8, 61


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """x + tanh(W x), after adding what is injected."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        x = x if state is None else x + state
        return x + torch.tanh(self.inner(x))


class Base(nn.Module):
    """Embedding, one core block, norm, head; what happens between is the subclass's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.core = Block()
        self.adapter = nn.Linear(2 * D, D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V)
        self.h: list[Tensor] = []
        self.h_m: list[Tensor] = []

    def note(self, h: Tensor, h_m: Tensor) -> None:
        self.h.append(h.detach().clone())
        self.h_m.append(h_m.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        self.h, self.h_m = [], []
        return self.run(self.embed(tokens))


class KeywordState(Base):
    def run(self, e: Tensor) -> Tensor:
        state = None
        for _ in range(4):
            new = self.core(e, state=state)
            self.note(e if state is None else state, new)
            state = new
        return self.head(self.norm(state))


class Normalised(Base):
    def run(self, e: Tensor) -> Tensor:
        x = e
        for _ in range(4):
            h = F.normalize(x, dim=-1)
            x = self.core(self.adapter(torch.cat([e, h], -1)))
            self.note(h, x)
        return self.head(self.norm(x))


class Pair(Base):
    def __init__(self):
        super().__init__()
        self.core = Two()

    def run(self, e: Tensor) -> Tensor:
        h = torch.zeros_like(e) + 0.1
        for _ in range(4):
            before = h
            e, h = self.core(e, h)
            self.note(before, h)
        return self.head(self.norm(h))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return e, self.block(e + h)


class DeepSupervision(Base):
    def run(self, e: Tensor) -> Tensor:
        x, outs = e, []
        for _ in range(4):
            before, x = x, self.core(x)
            self.note(before, x)
            outs.append(self.head(self.norm(x)))
        return outs[-1]


class InPlace(Base):
    def run(self, e: Tensor) -> Tensor:
        x = e.clone()
        for _ in range(4):
            before = x.clone()
            new = self.core(x)
            self.note(before, new)
            x += 0.5 * new
        return self.head(self.norm(x))


@pytest.mark.parametrize("make", [KeywordState, Normalised, Pair, DeepSupervision, InPlace])
def test_the_state_is_what_a_reader_would_call_it(make, tokens):
    module = make()
    if make is KeywordState:  # which is given none at first
        with pytest.warns(UserWarning, match=r"given no state at its first call, so h\(0\) is"):
            model = ls.wrap(module, tokens)
    else:
        model = ls.wrap(module, tokens)
    other = tokens.flip(0)
    states = ls.capture(model, other, logits=True)
    assert model.map.K == 4 and model.map.head == "head" and model.map.causal
    assert all(torch.equal(a, b) for a, b in zip(states.h, module.h, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(states.h_m, module.h_m, strict=True))
    assert torch.equal(states.logits, module(other))


class EarlyExit(Base):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(5))

    def run(self, e: Tensor) -> Tensor:
        outs = []
        for layer in self.layers:
            e = layer(e)
            outs.append(self.head(self.norm(e)))
        return outs[-1]


def test_a_head_after_every_layer_is_no_loop(tokens):
    model = ls.wrap(EarlyExit(), tokens, layout="1+1+2+1")
    assert [u.module for u in model.map.prelude] == ["layers.0"] and model.map.K == 2
    assert model.map.head == "head" and model.map.causal


class Named(Base):
    """Layers under names of their own around a list, of two classes by turns."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Block(), Block()
        self.middle = nn.ModuleList([Block(), nn.Sequential(nn.Linear(D, D), nn.Tanh())] * 1)
        self.middle += [Block(), nn.Sequential(nn.Linear(D, D), nn.Tanh())]

    def run(self, e: Tensor) -> Tensor:
        for layer in (self.first, *self.middle, self.last):
            e = layer(e)
        return self.head(self.norm(e))


def test_layers_of_two_classes_and_under_other_names_are_all_layers(tokens):
    module = Named()
    model = ls.wrap(module, tokens)
    wanted = ["first", *(f"middle.{i}" for i in range(4)), "last"]
    assert [u.module for u in model.map.prelude] == wanted
    assert torch.equal(ls.capture(model, tokens).h_emb, module.embed(tokens))


class Latents(Base):
    def run(self, e: Tensor) -> Tensor:
        x = e[:, :5]
        for _ in range(4):
            before, x = x, self.core(x)
            self.note(before, x)
        return self.head(self.norm(e + x.mean(1, keepdim=True)))


def test_a_loop_over_fewer_positions_than_tokens_is_found(tokens):
    module = Latents()
    states = ls.capture(ls.wrap(module, tokens), tokens)
    assert states.K == 4
    assert all(torch.equal(a, b) for a, b in zip(states.h_m, module.h_m, strict=True))


class Transposed(Base):
    def run(self, e: Tensor) -> Tensor:
        x = e.transpose(0, 1)
        for _ in range(4):
            x = self.core(x)
        return self.head(self.norm(x.transpose(0, 1)))


def test_a_loop_over_position_first_tensors_is_refused_with_a_way_out(tokens):
    with pytest.raises(InputError, match=r"core.*\(pos, batch, width\).*batch first"):
        ls.wrap(Transposed(), tokens)


class Images(Base):
    def run(self, e: Tensor) -> Tensor:
        x = e[:, :, None]
        for _ in range(4):
            x = self.core(x)
        return self.head(self.norm(e + x[:, :, 0]))


def test_a_block_that_runs_again_on_other_shapes_is_said(tokens):
    with pytest.raises(InputError, match=r"core runs 4 times on tensors of shape \(2, 9, 1, 8\)"):
        ls.wrap(Images(), tokens)


class Parts(Base):
    """A body that uses one block twice: (a b a c) three times."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Block(), Block(), Block()

    def run(self, e: Tensor) -> Tensor:
        x = e
        for _ in range(3):
            before = x
            x = self.c(self.a(self.b(self.a(x))))
            self.note(before, x)
        return self.head(self.norm(x))


def test_a_body_that_uses_a_block_twice_is_one_loop_and_can_be_listed(tokens):
    module = Parts()
    model = ls.wrap(module, tokens)
    assert str(model.map) == "0+4R3+0"
    assert all(
        torch.equal(a, b) for a, b in zip(ls.capture(model, tokens).h_m, module.h_m, strict=True)
    )
    listed = ls.wrap(module, tokens, spec={"core": [["a", "b", "a", "c"]] * 3})
    assert [it.units for it in listed.map.loops[0].iterations] == [
        it.units for it in model.map.loops[0].iterations
    ]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"core": ["embed"]}, "turns no"),
        ({"core": ["core"], "embed": "head"}, "before the first layer"),
        ({"core": ["core"], "state": {"columns": [0, 64]}}, "8 columns"),
        ({"core": ["core"], "state": {"columns": [4, 20]}}, "8 columns"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(spec, says, tokens):
    with pytest.raises(InputError, match=says):
        ls.wrap(DeepSupervision(), tokens, spec=spec)


@pytest.mark.parametrize("vocabulary", [V, 50257])
def test_a_large_vocabulary_does_not_hide_the_loop(vocabulary):
    module = DeepSupervision()
    module.embed = nn.Embedding(vocabulary, D)
    module.head = nn.Linear(D, vocabulary)
    assert str(ls.wrap(module).map) == "0+1R4+0"


class Coda(Base):
    """A module named coda that is not what follows the loop."""

    def __init__(self):
        super().__init__()
        self.middle, self.coda = nn.LayerNorm(D), Block()

    def run(self, e: Tensor) -> Tensor:
        for _ in range(3):
            e = self.core(e)
        return self.head(self.coda(self.middle(e)))


def test_a_module_named_coda_keeps_its_address(tokens):
    module = Coda()
    model = ls.wrap(module, tokens)
    seen = []
    handle = module.coda.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    cache = model.run_with_cache(tokens)[1]
    handle.remove()
    assert torch.equal(cache["coda.hook_in"], seen[0])
    assert torch.equal(cache["loop.core.after.hook_in"], cache["loop.2.hook_out"])
