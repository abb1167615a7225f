"""One tiny transformer block, and what every stand-in is made of."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HEADS, VOCAB, HIDDEN = 32, 4, 61, 40


class Norm(nn.Module):
    """Root mean square norm with a scale."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Attention without positions; each token sees itself and, if causal, only earlier ones."""

    def __init__(self, d: int = D, heads: int = HEADS, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, pos, d = x.shape
        parts = self.qkv(x).view(batch, pos, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, pos, d))


class MLP(nn.Module):
    """Two matrices with a GELU between them."""

    def __init__(self, d: int = D, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP; stream in, stream out."""

    def __init__(self, d: int = D, heads: int = HEADS, *, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(d), Attention(d, heads, causal=causal)
        self.norm2, self.mlp = Norm(d), MLP(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(n: int, **settings) -> nn.ModuleList:
    """A list of blocks."""
    return nn.ModuleList(Block(**settings) for _ in range(n))


def through(layers, x: Tensor) -> Tensor:
    """Run blocks one after the other."""
    for layer in layers:
        x = layer(x)
    return x


@dataclass
class Walk:
    """One loop, unrolled by hand.

    Attributes:
        h: What enters each iteration, and last what enters whatever follows the loop.
        h_m: What each iteration gives.
        path: Where each iteration stands.
    """

    h: list[Tensor] = field(default_factory=list)
    h_m: list[Tensor] = field(default_factory=list)
    path: list[str] = field(default_factory=list)


@dataclass
class States:
    """A forward pass, unrolled by hand; loops in order of execution, outer before inner."""

    h_emb: Tensor
    loops: list[Walk]
    h_out: Tensor
    logits: Tensor


def walk(body, x: Tensor, steps: int) -> tuple[Tensor, Walk]:
    """Unroll h(t+1) = body(h(t), t): the states, and what follows them."""
    found = Walk()
    for t in range(steps):
        found.h.append(x)
        x = body(x, t)
        found.h_m.append(x)
        found.path.append(str(t))
    found.h.append(x)
    return x, found


class Standin(nn.Module):
    """A decoder with random weights; `states` is its forward pass unrolled by hand."""

    seed = 0

    def finish(self, seed: int, noise: float = 0.15) -> None:
        """Move every parameter away from its default and switch to evaluation."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        self.eval()

    def states(self, tokens: Tensor) -> States:
        """The forward pass by hand."""
        raise NotImplementedError
