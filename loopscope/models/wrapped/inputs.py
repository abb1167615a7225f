"""Inputs: how a foreign forward is called, learned from the example."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.errors import InputError

Place = tuple[str, str | int]
"""Where token ids stand: `("args", 0)` or `("kwargs", "input_ids")`."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How to call a model.

    Attributes:
        tokens: Where the token ids stand among the arguments; None for a model without tokens.
        args, kwargs: The example's arguments; those that are no tensors are passed on in each call.
        cached: Whether forward takes `use_cache`, or the configuration has it.
        compiled: Whether some module was compiled.
    """

    tokens: Place | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    cached: str | None = None
    compiled: bool = False

    def complete(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of forward: those given, and what the example has besides.

        Args:
            args: A call's positional arguments; tokens alone go where the example has them. A dict
                or tuple alone is taken for all arguments, as in `example=`.
            kwargs: Its keyword arguments.

        Returns:
            Positional and keyword arguments.
        """
        only: Any = args[0] if len(args) == 1 else None
        if isinstance(only, Mapping) and self.tokens is not None:
            args, kwargs = (), {**only, **kwargs}
        elif isinstance(only, tuple) and not hasattr(only, "_fields"):
            args = only
        constant = {k: v for k, v in self.kwargs.items() if not isinstance(v, Tensor)}
        full = {**constant, **kwargs}
        if self.tokens is not None and isinstance(only, Tensor):
            side, place = self.tokens
            if side == "kwargs":
                args, full = (), {**full, str(place): only}
            else:
                rest = list(self.args)
                rest[int(place)] = only
                args = tuple(rest)
        if self.cached == "argument":
            full.setdefault("use_cache", False)
        return args, full

    def tokens_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The token ids among arguments that `complete` gave."""
        if self.tokens is None:
            raise InputError("the model was wrapped without token ids, so there are no targets.")
        side, place = self.tokens
        found = (
            args[int(place)]
            if side == "args" and int(place) < len(args)
            else kwargs.get(str(place))
        )
        if found is None:
            found = next((v for v in (*args, *kwargs.values()) if is_tokens(v)), None)
        if found is None:
            raise InputError("no token ids (batch, pos) were given, so there are no targets.")
        return found

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        """A context in which nothing compiled hides the hooks and no key-value cache is kept."""
        with ExitStack() as during:
            if self.compiled:
                during.enter_context(torch.compiler.set_stance("force_eager"))
            if self.cached == "config":
                config: Any = module.config
                during.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
            yield

    def device(self, module: nn.Module) -> torch.device:
        """Where the inputs belong: with the first parameter that is there."""
        real = (p.device for p in module.parameters() if p.device.type != "meta")
        return next(real, torch.device("cpu"))


def is_tokens(value: Any) -> bool:
    """Whether a value can be token ids: integers (batch, pos)."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and not value.is_floating_point()
        and value.dtype != torch.bool
    )


def learn(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Learn from an example how a model is called.

    Args:
        module: The model.
        args: The example's positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        What to pass in each call.
    """
    tokens: Place | None = next((("args", i) for i, v in enumerate(args) if is_tokens(v)), None)
    if tokens is None:
        order = sorted(kwargs, key=lambda k: k not in ("input_ids", "tokens", "idx"))
        tokens = next((("kwargs", k) for k in order if is_tokens(kwargs[k])), None)
    parameters = inspect.signature(module.forward).parameters
    config = getattr(module, "config", None)
    cached = None
    if "use_cache" in parameters:
        cached = "argument"
    elif getattr(config, "use_cache", None):
        cached = "config"
    return Inputs(
        tokens=tokens,
        args=args,
        kwargs=kwargs,
        cached=cached,
        compiled=any(getattr(m, "_compiled_call_impl", None) is not None for m in module.modules()),
    )
