"""First states of another form, and what stands between one iteration and the next."""

import pytest
import torch
from torch import Tensor, nn

import loopscope as ls
from tests.models.wrapped.small import TOKENS, Block, Small


class Beside(nn.Module):
    """A core that is given its state and the input apart."""

    def __init__(self, d: int):
        super().__init__()
        self.mix, self.block = nn.Linear(2 * d, d), Block(d)

    def forward(self, e: Tensor, state: Tensor | None = None) -> Tensor:
        if state is None:
            return self.block(e)
        return self.block(self.mix(torch.cat([e, state.expand_as(e)], -1)))


class First(Small):
    """A loop whose first state is a vector, (1, 1, d), (1, pos, d), or no state at all."""

    def __init__(self, form: str):
        self.form = form
        super().__init__()

    def build(self, d: int) -> None:
        self.core = Beside(d)
        shapes = {"vector": (d,), "constant": (1, 1, d), "positions": (1, 8, d)}
        if self.form in shapes:
            self.first = nn.Parameter(torch.randn(shapes[self.form]))

    def loop(self, e: Tensor) -> Tensor:
        state = self.first if self.form != "none" else None
        for _ in range(self.n_loops):
            state = self.core(e, state)
        return state


@pytest.mark.parametrize("form", ["vector", "constant", "positions"])
def test_a_first_state_that_is_the_same_for_all_is_shown_as_it_is(form):
    module = First(form)
    trajectory = ls.capture(ls.wrap(module, TOKENS), TOKENS)
    assert torch.equal(trajectory.h[0], module.first.expand(2, 8, 32))
    assert torch.equal(trajectory.h[1], trajectory.h_m[0])
    assert trajectory.h_emb.shape == (2, 8, 32)


def test_a_first_state_that_is_not_given_raises_a_doubt():
    with pytest.warns(UserWarning, match="core is given no state at its first call, so h.0. is"):
        model = ls.wrap(First("none"), TOKENS)
    assert "h(0) is something else" in "\n".join(model.outline().lines())
    tables = ls.measure(model, TOKENS)
    assert any("h(0) is something else" in note for note in _notes(tables))


class Mixed(Small):
    """A loop whose own code makes something of what the core gives."""

    def __init__(self, way: str):
        self.way = way
        super().__init__()

    def loop(self, x: Tensor) -> Tensor:
        first = x
        for _ in range(self.n_loops):
            given = self.core(x)
            if self.way == "residual":
                x = x + given
            elif self.way == "anchor":
                x = 0.5 * given + first
            elif self.way == "norm":
                x = nn.functional.layer_norm(given, (32,))
            else:
                x = given
        return x


@pytest.mark.parametrize(
    ("way", "mixing"),
    [("plain", ""), ("residual", "h_m(t) + h(t)"), ("anchor", "0.5·h_m(t) + h(0)"), ("norm", "")],
)
def test_what_the_code_makes_of_an_output_is_recognised(way, mixing):
    model = ls.wrap(Mixed(way), TOKENS)
    assert model.map.main.mixing == mixing
    said = [n for n in _notes(ls.measure(model, TOKENS)) if "is not h_m(t-1)" in n]
    assert len(said) == (way == "norm")
    assert ("is not h_m(t-1)" in "\n".join(model.outline().lines())) == (way == "norm")


def _notes(tables) -> list[str]:
    [facts] = tables.provenance["models"].values()
    return facts["notes"]
