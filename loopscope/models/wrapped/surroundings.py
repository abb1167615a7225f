"""Surroundings: what has to be different around a forward pass that is looked at."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from loopscope.errors import InputError
from loopscope.models.wrapped.inputs import Inputs
from loopscope.models.wrapped.loopcount import Setting, looping
from loopscope.models.wrapped.noise import same_for_every_sample

_BUSY: set[int] = set()


@contextmanager
def alone(module: nn.Module, name: str) -> Iterator[None]:
    """A context that a model may not enter again from within, as from one of its hooks.

    Raises:
        InputError: if it does.
    """
    if id(module) in _BUSY:
        raise InputError(
            f"a hook of {name!r} runs the model that it is a hook of; run it before or after, and "
            "let the hook use what came out."
        )
    _BUSY.add(id(module))
    try:
        yield
    finally:
        _BUSY.discard(id(module))


@contextmanager
def as_wanted(
    module: nn.Module,
    inputs: Inputs,
    chosen: tuple[Setting, ...],
    seed: int | None,
    batch: int | None = None,
    pos: int | None = None,
) -> Iterator[None]:
    """A context with the number of iterations, random numbers and no cache, as they must be.

    Args:
        module: The model.
        inputs: How it is called.
        chosen: Numbers of iterations that were set.
        seed: As `same_for_every_sample`, `batch` and `pos` too.
    """
    with (
        looping(module, chosen),
        same_for_every_sample(module, seed, batch, pos),
        inputs.running(module),
    ):
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which compiled modules run their original code, which calls hooks."""
    with torch.compiler.set_stance("force_eager"):
        yield


class _Straight:
    """In place of torch's checkpointing of a function: the function."""

    @staticmethod
    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """A context in which nothing is computed a second time for the gradients.

    The second time hooks would be gone, and gradients those of another forward pass.
    """
    with ExitStack() as during:
        for name, other in (
            ("CheckpointFunction", _Straight),
            ("_checkpoint_without_reentrant_generator", _nothing),
        ):
            during.callback(setattr, checkpoint, name, getattr(checkpoint, name))
            setattr(checkpoint, name, other)
        for part in module.modules() if torch.is_grad_enabled() else ():
            if part.__dict__.get("gradient_checkpointing") is True:
                during.callback(setattr, part, "gradient_checkpointing", True)
                vars(part)["gradient_checkpointing"] = False
        yield


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """A context after which a module's buffers (running means, counters) are as they were."""
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                before.append((part, name, buffer, buffer.detach().clone()))
    try:
        yield
    finally:
        with torch.inference_mode(any(b.is_inference() for _, _, b, _ in before)), torch.no_grad():
            for part, name, buffer, values in before:
                # one put anew by a model in evaluation mode is a table that has grown
                if part._buffers.get(name) is not buffer and part.training:
                    part._buffers[name] = buffer
                if buffer.shape == values.shape and not torch.equal(buffer, values):
                    buffer.copy_(values)
