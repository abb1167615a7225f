"""What may have been read wrongly raises a doubt."""

import pytest
import torch
from torch import Tensor, nn

import loopscope as ls
from tests.models.wrapped.small import TOKENS, Block


class Columns(nn.Module):
    """A cell that is run over the columns of a table, one after the other."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.embed, self.cell = nn.Embedding(50, d), Block(d)
        self.head = nn.Linear(d, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        state, every = torch.zeros_like(x[:, :1]), []
        for i in range(x.shape[1]):
            state = self.cell(state + x[:, i : i + 1])
            every.append(state)
        return self.head(torch.cat(every, 1))


class Projected(nn.Module):
    """Layers and a projection head of the same width; no logits."""

    class Head(nn.Module):
        def __init__(self, d: int):
            super().__init__()
            self.a, self.b = nn.Linear(d, d), nn.Linear(d, d)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    def __init__(self, head: bool, d: int = 32):
        super().__init__()
        self.embed, self.layers = nn.Embedding(50, d), nn.ModuleList(Block(d) for _ in range(4))
        self.head = self.Head(d) if head else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_loop_over_positions_raises_a_doubt():
    with pytest.warns(UserWarning, match="runs once for each of the example's 8 positions"):
        model = ls.wrap(Columns(), TOKENS)
    assert "it may be a loop over positions" in "\n".join(model.outline().lines())


def test_a_head_that_is_counted_as_a_layer_raises_a_doubt():
    with pytest.warns(UserWarning, match="head follows the layers, is of another class"):
        ls.wrap(Projected(head=True), TOKENS, layout="1+2+2")
    ls.wrap(Projected(head=False), TOKENS, layout="1+2+1")
    model = ls.wrap(Projected(head=True), TOKENS, spec={"prelude": ["layers.*"]})
    assert model.map.n_layers == 4
