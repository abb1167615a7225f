"""Direct calls: hooks act too when somebody else calls the original, as its `generate` does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable
from warnings import warn

import torch
from torch import Tensor, nn

from loopscope.errors import InputError
from loopscope.models.hooks import Point
from loopscope.models.wrapped.inputs import Arguments
from loopscope.models.wrapped.run_context import (
    called_directly,
    is_running,
    runs_by_itself,
    runs_in_its_hook,
)


@runtime_checkable
class Host(Protocol):
    """What direct calls need of a wrapped model."""

    module: nn.Module
    _live: dict[str, Any]
    _originals: dict[str, nn.Module]

    def direct_pass(
        self, forward: Callable[..., Any], arguments: Arguments, *, generating: bool
    ) -> Any:
        """A forward pass that somebody else has asked for, with the hooks of the model.

        Args:
            forward: The original's forward.
            arguments: What it is given.
            generating: Whether the wrapped model's `generate` has asked for it.

        Returns:
            What the original returns.
        """


class DirectCalls:
    """Takes the place of the original's forward while hooks are asked for, and gives it its taps.

    A forward pass of a wrapped model itself has its taps already and is let through. A part that is
    called outside any forward pass is in no iteration, so its hooks cannot act: a warning says so.

    Args:
        model: The wrapped model.
    """

    def __init__(self, model: Host) -> None:
        self.model = model
        self.generating = False
        self._in_pass = False
        self._forward: _Forward | None = None
        self._guards: dict[str, Any] = {}

    def note(self, point: "Address") -> None:
        """Take note that a point was given a hook.

        Args:
            point: The point.
        """
        self.model._live.setdefault(str(point.name), point)
        self._attach()
        if point.part and point.part not in self._guards:
            module = self.model._originals[point.part]
            guard = partial(self._guard, point.part)
            self._guards[point.part] = module.register_forward_pre_hook(guard)

    def tidy(self) -> None:
        """Leave the original as it was, where no hook needs it otherwise any more."""
        parts = {point.part for point in self.model._live.values() if used(point)}
        for part in [part for part in self._guards if part not in parts]:
            self._guards.pop(part).remove()
        if not parts and not self.generating:
            self._detach()

    @contextmanager
    def in_generation(self) -> Iterator[None]:
        """Within this context every direct call is a step of the wrapped model's `generate`.

        Yields:
            Nothing.
        """
        self._attach()
        self.generating = True
        try:
            yield
        finally:
            self.generating = False
            self.tidy()

    def _attach(self) -> None:
        if self._forward is None:
            self._forward = _Forward(self, self.model.module)

    def _detach(self) -> None:
        if self._forward is not None:
            self._forward.remove(self.model.module)
            self._forward = None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The original's forward, called by whomever.

        Args:
            forward: That forward.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What it returns.

        Raises:
            InputError: if a hook calls it.
        """
        model = self.model
        idle = not self.generating and not any(map(used, model._live.values()))
        if idle or runs_by_itself(model.module):
            return forward(*args, **kwargs)
        if self._in_pass:
            raise runs_in_its_hook(type(model.module).__name__)
        self._in_pass = True
        try:
            with called_directly(model.module):
                return model.direct_pass(forward, (args, kwargs), generating=self.generating)
        finally:
            self._in_pass = False

    def _guard(self, part: str, module: nn.Module, args: Any) -> None:
        if not is_running(self.model.module):
            warn(
                f"{part} was called outside a forward pass of its model, so it is in no iteration "
                "and its hooks saw nothing; call the whole model: model(...), model.generate(...) "
                "or model.module(...).",
                stacklevel=4,
            )


class _Forward:
    """In place of a module's forward: the same one, run by direct calls.

    Args:
        calls: Who runs it.
        module: The module, which has this forward until `remove`.
    """

    def __init__(self, calls: DirectCalls, module: nn.Module) -> None:
        self.calls: DirectCalls | None = calls
        self.__wrapped__ = module.forward  # what shows its signature
        self.replaced = vars(module).get("forward")
        # what was compiled in place looks at no forward but the one it was compiled with
        self.compiled = module._compiled_call_impl
        if self.compiled is not None:
            module._compiled_call_impl = None
        vars(module)["forward"] = self
        global _entrance  # here, since importing the compiler takes seconds
        if _entrance is _enter:
            _entrance = torch.compiler.disable(_enter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _entrance(self, args, kwargs)

    def remove(self, module: nn.Module) -> None:
        """Put back what was there; under a forward that came later it stays, and does nothing."""
        self.calls = None
        forward = vars(module).get("forward")
        if forward is not self:
            return
        while isinstance(forward, _Forward) and forward.calls is None:
            if forward.compiled is not None and module._compiled_call_impl is None:
                module._compiled_call_impl = forward.compiled
            forward = forward.replaced
        if forward is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = forward


def _enter(forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if forward.calls is None:
        return forward.__wrapped__(*args, **kwargs)
    return forward.calls.run(forward.__wrapped__, args, kwargs)


_entrance: Callable[..., Any] = _enter


class Address(Point):
    """A point of a wrapped model, which says when it is given a hook.

    Args:
        name: Its canonical name.
        part: Name of the module that its tensor enters or leaves.
        calls: Whom it tells.
    """

    def __init__(self, name: str, part: str, calls: DirectCalls) -> None:
        super().__init__()
        self.name = name
        self.part = part
        self.calls = calls

    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Add a hook to this point.

        Args:
            *args: As in TransformerLens.
            **kwargs: As in TransformerLens.

        Returns:
            Its handle.
        """
        handle = super().add_hook(*args, **kwargs)
        self.calls.note(self)
        return handle


def used(point: Point) -> bool:
    """Whether a point has hooks.

    Args:
        point: The point.

    Returns:
        Whether it has.
    """
    return bool(point.fwd_hooks or point.bwd_hooks)


def same_shape(point: Point) -> Callable[[Tensor], Any]:
    """A point whose hooks must return the shape that they were given.

    Args:
        point: The point.

    Returns:
        What to do with a tensor.

    Raises:
        InputError: when a hook returns another.
    """

    def checked(tensor: Tensor) -> Any:
        answer = point(tensor)
        if answer.shape != tensor.shape:
            raise InputError(
                f"a hook at {point.name} was given {tuple(tensor.shape)} and returned "
                f"{tuple(answer.shape)}. It must return as many positions as it was given: in "
                "generation one more at each step, or with a cache the new one alone."
            )
        return answer

    return checked
