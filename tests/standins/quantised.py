"""Models whose weights are no parameters: dynamically quantised, or codes and scales in buffers."""

import warnings

import torch
from torch import Tensor, nn

from tests.models.wrapped.small import TOKENS, Block, Small


class Int8(nn.Module):
    """A linear layer whose weight is a buffer of int8 codes with a scale for each row.

    Args:
        linear: The layer that is quantised.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight_int8.to(x.dtype) * self.scale).T
        return y if self.bias is None else y + self.bias


class Frozen(nn.Module):
    """A linear layer whose weight is a buffer of floats."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Table(nn.Module):
    """An embedding whose table is a buffer."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.register_buffer("codes", table.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.codes[tokens]


class Tables(nn.Module):
    """Positions and a causal mask as buffers, as many blocks have them: no matrices."""

    def __init__(self, width: int, context: int = 64) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(context, width))
        self.register_buffer("mask", torch.ones(context, context, dtype=torch.uint8).tril())

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        mixed = self.mask[:n, :n].to(x) / self.mask[:n, :n].sum(-1, keepdim=True)
        return x + 0.1 * (mixed @ x + self.positions[:n])


class Masked(nn.Module):
    """A causal block with its mask and positions in a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables, self.block = Tables(width), Block(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.tables(x))


def replaced(module: nn.Module, by: type[nn.Module], what: type = nn.Linear) -> nn.Module:
    """A model with every part of a kind replaced, a shared one by one of its own."""
    made: dict[int, nn.Module] = {}
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if type(child) is what:
                new = made.setdefault(id(child), by(child))
                setattr(part, name, new)
    return module


def dynamic(module: nn.Module) -> nn.Module:
    """A model, dynamically quantised by torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


__all__ = ["TOKENS", "Frozen", "Int8", "Masked", "Small", "Table", "dynamic", "replaced"]
