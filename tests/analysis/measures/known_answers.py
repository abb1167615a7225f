"""Looped models whose mechanism is known: sums over loops, and a bit that is used or not."""

import torch
from torch import Tensor, nn


class Adding(nn.Module):
    """One-hot h plus one-hot e, modulo n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.out = nn.Linear(n, n, bias=False)
        self.out.weight.data = torch.eye(n)
        i, j, k = torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij")
        self.register_buffer("table", ((i + j) % n == k).float())

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return self.out(torch.einsum("bpi,bpj,ijk->bpk", h, e, self.table))


class Sums(nn.Module):
    """h(0) = x, h(t+1) = h(t) + x modulo n: after K loops (K + 1)·x, predicted at each token."""

    def __init__(self, n: int = 7, K: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, n)
        self.embed.weight.data = torch.eye(n)
        self.core, self.K = Adding(n), K
        self.head = nn.Linear(n, n, bias=False)
        self.head.weight.data = 10 * torch.eye(n)

    def forward(self, tokens: Tensor) -> Tensor:
        h = e = self.embed(tokens)
        for _ in range(self.K):
            h = self.core(h, e)
        return self.head(h)


class Growing(nn.Module):
    """1.5·h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width, bias=False)
        self.out.weight.data = 1.5 * torch.eye(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h)


class Bits(nn.Module):
    """Tokens 0 … 7 as signs of their bits and noise; only the lowest bit leads to the logits.

    A token's parity predicts the next token's: the logits are `sharp` for tokens of the parity
    that the state's first direction says, whatever the second one, the token's next bit, says.
    """

    def __init__(self, K: int = 2, sharp: float = 4.0, width: int = 8) -> None:
        super().__init__()
        ids = torch.arange(8)
        self.embed = nn.Embedding(8, width)
        noise = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
        noise[:, 0], noise[:, 1] = 1 - 2.0 * (ids % 2), 1 - 2.0 * (ids // 2 % 2)
        self.embed.weight.data = noise
        self.core, self.K = Growing(width), K
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight.data = torch.zeros(8, width)
        self.head.weight.data[:, 0] = sharp * (1 - 2.0 * (ids % 2)) / 1.5**K

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for _ in range(self.K):
            h = self.core(h)
        return self.head(h)


class Headless(Bits):
    """The states alone, of fewer numbers than there are tokens."""

    def __init__(self) -> None:
        super().__init__(width=5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.core(self.core(self.embed(tokens)))
