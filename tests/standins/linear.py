"""A loop whose iteration is h ↦ A h + b: its Jacobian, its limit and its paths are known."""

import torch
from torch import Tensor, nn

import loopscope as ls


class Affine(nn.Module):
    """h ↦ A h + b."""

    def __init__(self, A: Tensor, b: Tensor | None) -> None:
        super().__init__()
        self.map = nn.Linear(len(A), len(A))
        with torch.no_grad():
            self.map.weight.copy_(A)
            self.map.bias.copy_(torch.zeros(len(A)) if b is None else b)

    def forward(self, h):
        return self.map(h)


class Linear(nn.Module):
    """Embedding, K iterations of `Affine`, head; vocabulary of 20."""

    def __init__(self, A: Tensor, b: Tensor | None = None, K: int = 4, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.K = K
        self.embed = nn.Embedding(20, len(A))
        self.core = Affine(A, b)
        self.head = nn.Linear(len(A), 20)

    def forward(self, tokens, loops: int | None = None):
        h = self.embed(tokens)
        for _ in range(self.K if loops is None else loops):
            h = self.core(h)
        return self.head(h)


def wrapped_linear(A: Tensor, b: Tensor | None = None, K: int = 4):
    """`Linear`, wrapped."""
    return ls.wrap(Linear(A, b, K), example=torch.arange(6).view(1, 6))
