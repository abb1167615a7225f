"""What runs in every iteration and leads to no later one is no part of the core."""

import pytest
import torch
from torch import Tensor, nn

import loopscope as ls
from tests.models.wrapped.small import TOKENS, Block, Small


class Supervised(Small):
    """A loop whose coda and head run in every iteration (deep supervision)."""

    def build(self, d: int) -> None:
        self.states: list[Tensor] = []

    def read(self, x: Tensor, t: int) -> Tensor:
        return self.rest(x)

    def forward(self, tokens: Tensor) -> dict:
        x, every = self.pre(self.embed(tokens)), []
        self.states = [x.detach().clone()]
        for t in range(self.n_loops):
            x = self.core(x)
            self.states.append(x.detach().clone())
            every.append(self.read(x, t))
        return {"logits": every[-1], "every": every}


class TiedCoda(Supervised):
    """The same coda block twice in each iteration."""

    def read(self, x: Tensor, t: int) -> Tensor:
        return self.head(self.norm(self.coda(self.coda(x))))


class CodaEach(Supervised):
    """A coda of each iteration's own."""

    def build(self, d: int) -> None:
        super().build(d)
        self.codas = nn.ModuleList(Block(d) for _ in range(self.n_loops))

    def read(self, x: Tensor, t: int) -> Tensor:
        return self.head(self.norm(self.codas[t](x)))


class Auxiliary(Supervised):
    """Another block and head read the states between; the last is read by the coda."""

    def build(self, d: int) -> None:
        super().build(d)
        self.auxiliary, self.second = Block(d), nn.Linear(d, 50)

    def read(self, x: Tensor, t: int) -> Tensor:
        return self.rest(x) if t == self.n_loops - 1 else self.second(self.auxiliary(x))


class NoGradients(Supervised):
    """All but the last iteration run without gradients, from which nothing could be told."""

    def forward(self, tokens: Tensor) -> dict:
        x, every = self.pre(self.embed(tokens)), []
        self.states = [x.detach().clone()]
        for t in range(self.n_loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and t == self.n_loops - 1):
                x = self.core(x)
                self.states.append(x.detach().clone())
                every.append(self.read(x, t))
        return {"logits": every[-1], "every": every}


class FedBack(Supervised):
    """What the coda gives goes into the next iteration: it is a part of the loop."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.pre(self.embed(tokens))
        for _ in range(self.n_loops):
            x = x + self.coda(self.core(x))
        return self.head(self.norm(x))


class Embedded(Supervised):
    """The most likely token of each iteration is embedded and added: integers carry it on."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.pre(self.embed(tokens))
        for _ in range(self.n_loops):
            x = self.core(x)
            logits = self.rest(x)
            x = x + self.embed(logits.argmax(-1))
        return logits


CODAS = {
    Supervised: ("coda",), TiedCoda: ("coda", "coda"), CodaEach: ("codas.3",),
    Auxiliary: ("coda",), NoGradients: ("coda",),
}  # fmt: skip


@pytest.mark.parametrize("make", CODAS)
def test_a_coda_run_in_every_iteration_is_none_of_the_core(make):
    module = make()
    model = ls.wrap(module, TOKENS)
    trajectory = ls.capture(model, TOKENS, logits=True)
    assert {u.module for it in model.map.loops[0].iterations for u in it.units} == {"core"}
    states = [*zip(trajectory.h, module.states, strict=True)]
    assert all(torch.equal(a, b) for a, b in states)
    assert all(map(torch.equal, trajectory.h_m, module.states[1:]))
    assert torch.equal(trajectory.logits, module(TOKENS)["logits"])
    if make is not TiedCoda:  # which repeats, and so is shown as a loop after the loop
        assert [u.module for u in model.map.coda] == list(CODAS[make])


def test_the_readout_is_that_of_the_state():
    module = Supervised()
    model = ls.wrap(module, TOKENS)
    result = module(TOKENS)
    for t, logits in enumerate(result["every"]):
        read = torch.stack(list(model.read_out_logits(module.states[t + 1], TOKENS)))
        torch.testing.assert_close(read, logits)


def test_a_coda_of_an_iteration_can_be_addressed_in_it():
    module = Supervised()
    model = ls.wrap(module, TOKENS)
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["loop.1.coda.hook_in"], module.states[2])
    assert torch.equal(cache["coda.hook_in"], module.states[4])


@pytest.mark.parametrize("make", [FedBack, Embedded])
def test_what_leads_on_stays_in_the_loop(make):
    model = ls.wrap(make(), TOKENS)
    assert {u.module for u in model.map.loops[0].iterations[1].units} == {"core", "coda"}


def test_a_spec_takes_modules_out_of_the_core():
    model = ls.wrap(FedBack(), TOKENS, spec={"coda": ["coda"]})
    loop = model.map.loops[0]
    assert {u.module for it in loop.iterations for u in it.units} == {"core"}
    assert [u.module for u in model.map.coda] == ["coda"]
