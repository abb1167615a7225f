"""Noise: random numbers of a forward pass, the same in every run and for every sample."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loopscope.probes.loops.trace import seeded

_LIKE = {torch.randn_like, torch.rand_like, torch.bernoulli, torch.normal}
_SIZED = {torch.randn, torch.rand}
_IN_PLACE = {
    Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_, Tensor.cauchy_,
    Tensor.log_normal_, Tensor.geometric_,
}  # fmt: skip


class _OnePerBatch(TorchFunctionMode):
    """Draws what is random for the first sample and repeats it for the others.

    Args:
        batch, pos: Shape of this run's tokens. Only what is (batch, …) is repeated, and
            (batch · pos, width), which has all samples in one axis; where batch and pos are equal,
            a matrix is ambiguous and drawn as it is.
    """

    def __init__(self, batch: int, pos: int) -> None:
        super().__init__()
        self.batch, self.pos = batch, pos

    def _one(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of one sample's part, None for what is not made of samples."""
        if self.batch < 2 or len(shape) < 2:
            return None
        if shape[0] == self.batch and (len(shape) > 2 or self.batch != self.pos):
            return (1, *shape[1:])
        if shape[0] == self.batch * self.pos and len(shape) == 2:
            return (self.pos, *shape[1:])
        return None

    def _all(self, one: Tensor) -> Tensor:
        return one.repeat(self.batch, *[1] * (one.ndim - 1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and (one := self._one(args[0].shape)):
            first = args[0][: one[0]].clone()
            func(first, *args[1:], **kwargs)
            return args[0].copy_(self._all(first))
        tensors = bool(args) and all(isinstance(a, Tensor) for a in args)
        if func in _LIKE and tensors and (one := self._one(args[0].shape)):
            return self._all(func(*(a[: one[0]] for a in args), **kwargs))
        if func in _SIZED and "out" not in kwargs:
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if one := self._one(size):
                return self._all(func(*one, **kwargs))
        return func(*args, **kwargs)


@contextmanager
def same_for_every_sample(
    module: nn.Module, seed: int | None, batch: int | None = None, pos: int | None = None
) -> Iterator[None]:
    """Within this context a model's random numbers are the same in each run and for each sample.

    Without it a random initial state would depend on the batch a sample is in.

    Args:
        module: The model, for its devices.
        seed: None for a model that draws none: then nothing is done.
        batch, pos: Shape of this run's tokens; without them samples differ.
    """
    if seed is None:
        yield
        return
    with (
        seeded(module, seed),
        nullcontext() if batch is None or pos is None else _OnePerBatch(batch, pos),
    ):
        yield
