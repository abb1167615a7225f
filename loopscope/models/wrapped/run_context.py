"""Context of a forward pass that is looked at: seeds, loop counts, attention, caches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.loops import seeded
from loopscope.models.wrapped.inputs import Inputs
from loopscope.models.wrapped.loop_count import Setting, looping

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

    def _sample_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of one sample's part, None for what is not made of samples."""
        if self.batch < 2 or len(shape) < 2:
            return None
        if shape[0] == self.batch and (len(shape) > 2 or self.batch != self.pos):
            return (1, *shape[1:])
        if shape[0] == self.batch * self.pos and len(shape) == 2:
            return (self.pos, *shape[1:])
        return None

    def _repeat(self, part: Tensor) -> Tensor:
        return part.repeat(self.batch, *[1] * (part.ndim - 1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and (shape := self._sample_shape(args[0].shape)):
            first = args[0][: shape[0]].clone()
            func(first, *args[1:], **kwargs)
            return args[0].copy_(self._repeat(first))
        tensors = bool(args) and all(isinstance(a, Tensor) for a in args)
        if func in _LIKE and tensors and (shape := self._sample_shape(args[0].shape)):
            return self._repeat(func(*(a[: shape[0]] for a in args), **kwargs))
        if func in _SIZED and "out" not in kwargs:
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if shape := self._sample_shape(size):
                return self._repeat(func(*shape, **kwargs))
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

    Returns:
        The context.
    """
    if seed is None:
        yield
        return
    with (
        seeded(module, seed),
        nullcontext() if batch is None or pos is None else _OnePerBatch(batch, pos),
    ):
        yield


_BUSY: set[int] = set()  # modules in a forward pass that is looked at
_DIRECT: set[int] = set()  # those of them that somebody else called


@contextmanager
def not_nested(module: nn.Module, name: str) -> Iterator[None]:
    """A context that a model may not enter again from within, as from one of its hooks.

    Args:
        module: The model.
        name: What the error calls it.

    Returns:
        The context.

    Raises:
        InputError: if it does.
    """
    if id(module) in _BUSY:
        raise runs_in_its_hook(name)
    with _among(_BUSY, module):
        yield


def runs_in_its_hook(name: str) -> InputError:
    """The error for a model that is run by one of its hooks.

    Args:
        name: What the error calls it.

    Returns:
        The error.
    """
    return InputError(
        f"a hook of {name!r} runs the model that it is a hook of; run it before or after, and let "
        "the hook use what came out."
    )


@contextmanager
def called_directly(module: nn.Module) -> Iterator[None]:
    """A context in which somebody else's forward pass of a model is looked at.

    Args:
        module: The model.

    Returns:
        The context.
    """
    with _among(_BUSY, module), _among(_DIRECT, module):
        yield


@contextmanager
def _among(modules: set[int], module: nn.Module) -> Iterator[None]:
    """A context in which a module is one of some."""
    outermost = id(module) not in modules
    modules.add(id(module))
    try:
        yield
    finally:
        if outermost:
            modules.discard(id(module))


def is_running(module: nn.Module) -> bool:
    """Whether a forward pass of a model is looked at.

    Args:
        module: The model.

    Returns:
        Whether it is.
    """
    return id(module) in _BUSY


def runs_by_itself(module: nn.Module) -> bool:
    """Whether that pass is one that a wrapped model makes, or `wrap`.

    Args:
        module: The model.

    Returns:
        Whether it is; not for a pass that somebody else has asked for.
    """
    return id(module) in _BUSY - _DIRECT


@contextmanager
def controlled(
    module: nn.Module,
    inputs: Inputs,
    settings: tuple[Setting, ...],
    seed: int | None,
    batch: int | None = None,
    pos: int | None = None,
) -> Iterator[None]:
    """A context with the number of iterations, random numbers and no cache, as they must be.

    Args:
        module: The model.
        inputs: How it is called.
        settings: Numbers of iterations that were set.
        seed: As `same_for_every_sample`, `batch` and `pos` too.

    Returns:
        The context.
    """
    with (
        _among(_BUSY, module),
        looping(module, settings),
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

    Args:
        module: The model.

    Returns:
        The context.
    """
    with ExitStack() as during:
        for name, replacement in (
            ("CheckpointFunction", _Straight),
            ("_checkpoint_without_reentrant_generator", _nothing),
        ):
            during.callback(setattr, checkpoint, name, getattr(checkpoint, name))
            setattr(checkpoint, name, replacement)
        for part in module.modules() if torch.is_grad_enabled() else ():
            if part.__dict__.get("gradient_checkpointing") is True:
                during.callback(setattr, part, "gradient_checkpointing", True)
                vars(part)["gradient_checkpointing"] = False
        yield


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """A context after which a module's buffers (running means, counters) are as they were.

    Args:
        module: The module.

    Returns:
        The context.
    """
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


@contextmanager
def eager_attention(module: Any, *, patterns: bool) -> Iterator[None]:
    """Within this context a model of transformers computes attention patterns.

    Args:
        module: The model.
        patterns: Whether they are needed; otherwise nothing is done.

    Returns:
        The context.
    """
    before = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not patterns or before == "eager":
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def only_read(point: Point) -> Callable[[Tensor], None]:
    """A point whose hooks may look at an attention pattern; the model does not use what it returns.

    Args:
        point: The point.

    Returns:
        What to do with the pattern.

    Raises:
        InputError: when a hook changes it.
    """

    def look(pattern: Tensor) -> None:
        if not torch.equal(point(pattern), pattern):
            raise InputError(
                f"{point.name} can be read, not changed: the attention has used its pattern before "
                "it returns it. Patch the attention's output (hook_out) instead."
            )

    return look
