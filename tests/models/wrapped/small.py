"""A small looped model whose loop and parts tests replace, and tensors seen by torch hooks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    """A causal block: running mean over positions, then a wide layer."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.n, self.a, self.b = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.b(F.gelu(self.a(self.n(x.cumsum(1) / steps))))


class Small(nn.Module):
    """Embedding, a block, a core repeated, a block, a head."""

    def __init__(self, n_loops: int = 4, d: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.n_loops, self.embed = n_loops, nn.Embedding(50, d)
        self.pre, self.core, self.coda = Block(d), Block(d), Block(d)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 50)
        self.build(d)
        self.eval()

    def build(self, d: int) -> None:
        """Further modules."""

    def loop(self, x: Tensor) -> Tensor:
        for _ in range(self.n_loops):
            x = self.core(x)
        return x

    def rest(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.coda(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.loop(self.pre(self.embed(tokens))))


def seen(module: nn.Module, name: str, side: str, *args, **kwargs) -> list[Tensor]:
    """Copies of what each call of a module is given or gives, by a hook of torch."""
    found: list[Tensor] = []
    part = module.get_submodule(name)
    if side == "in":
        handle = part.register_forward_pre_hook(lambda m, a: found.append(a[0].detach().clone()))
    else:
        handle = part.register_forward_hook(lambda m, a, r: found.append(r.detach().clone()))
    with torch.no_grad():
        module(*(args or (TOKENS,)), **kwargs)
    handle.remove()
    return found


def same(found, wanted) -> bool:
    """Whether two series of tensors are equal, bit by bit."""
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))
