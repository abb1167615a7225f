"""Noise: random numbers of a forward pass, the same in every run and for every sample."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    """Draws what is random for the first sample and repeats it for the others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and args[0].ndim > 1 and args[0].shape[0] > 1:
            first = args[0][:1].clone()
            func(first, *args[1:], **kwargs)
            return args[0].copy_(first.expand_as(args[0]))
        tensors = bool(args) and all(isinstance(a, Tensor) for a in args)
        if func in _LIKE and tensors and args[0].ndim > 1 and args[0].shape[0] > 1:
            drawn = func(*(a[:1] for a in args), **kwargs)
            return drawn.expand(args[0].shape).clone()
        if func in _SIZED:
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if len(size) > 1 and size[0] > 1 and "out" not in kwargs:
                drawn = func(1, *size[1:], **kwargs)
                return drawn.expand(*size).clone()
        return func(*args, **kwargs)


@contextmanager
def same_for_every_sample(module: nn.Module, seed: int | None) -> Iterator[None]:
    """Within this context a model's random numbers are the same in each run and for each sample.

    Without it a random initial state would depend on the batch a sample is in.

    Args:
        module: The model, for its devices.
        seed: None for a model that draws none: then nothing is done.
    """
    if seed is None:
        yield
        return
    with seeded(module, seed), _OnePerBatch():
        yield
