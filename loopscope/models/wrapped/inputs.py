"""Inputs: how a foreign forward is called, learned from the example."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.errors import InputError, unknown_name

Place = tuple[str, str | int]
"""Where token ids stand: `("args", 0)` or `("kwargs", "input_ids")`."""


NATIVE = frozenset({
    "stop_at_layer", "start_at_layer", "prepend_bos", "loss_per_token", "past_kv_cache",
    "padding_side", "shortformer_pos_embed", "past_left_attention_mask", "token_type_embed",
})  # fmt: skip
"""Arguments of native models and TransformerLens, which models with **kwargs would swallow."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How to call a model.

    Attributes:
        tokens: Where the token ids stand among the arguments; None for a model without tokens.
        args, kwargs: The example's arguments; those that hold no tensors are passed on in each
            call.
        cached: Whether forward takes `use_cache`, or the configuration has it.
        names: Positional parameters of forward, in order.
        needed: Its parameters without a default.
        keywords: All its parameters by name.
        takes_more: Whether it has `*args`, and whether it has `**kwargs`.
    """

    tokens: Place | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    cached: str | None = None
    names: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    takes_more: tuple[bool, bool] = (True, True)

    def complete(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counts: Mapping[str, int] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of forward: those given, and what the example has besides.

        Args:
            args: A call's positional arguments; tokens alone go where the example has them. A dict
                or tuple alone is taken for all arguments, as in `example=`.
            kwargs: Its keyword arguments.
            counts: Numbers of iterations that were set; they hold where the call says nothing.

        Returns:
            Positional and keyword arguments.

        Raises:
            InputError: for arguments that forward does not take, or needs and is not given.
        """
        counts = counts or {}
        only: Any = args[0] if len(args) == 1 else None
        if isinstance(only, Mapping) and (
            self.tokens is not None or not any(isinstance(a, Mapping) for a in self.args)
        ):
            args, kwargs = (), {**only, **kwargs}
        elif isinstance(only, tuple) and not hasattr(only, "_fields"):
            args = only
        self._refuse(kwargs)
        if self.tokens is not None and isinstance(only, Tensor):
            args, kwargs = self._around(only, kwargs, counts)
        there = self.names[: len(args)]
        constant = {k: v for k, v in self.kwargs.items() if k not in there and not _holds_tensor(v)}
        told = {k: v for k, v in counts.items() if k not in there}
        full = {**constant, **told, **kwargs}
        self._check(args, full)
        return args, self._without_cache(full)

    def example(self, counts: Mapping[str, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example's arguments, with other numbers of iterations."""
        args = tuple(
            counts.get(self.names[i], value) if i < len(self.names) else value
            for i, value in enumerate(self.args)
        )
        there = self.names[: len(args)]
        more = {name: value for name, value in counts.items() if name not in there}
        return args, self._without_cache({**self.kwargs, **more})

    def _without_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"use_cache": False, **kwargs} if self.cached == "argument" else kwargs

    def _around(
        self, tokens: Tensor, kwargs: dict[str, Any], counts: Mapping[str, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tokens alone where the example has them, and its other arguments around them.

        The example's own tensors (a mask) belong to its tokens, so they are never passed on.
        """
        assert self.tokens is not None
        side, place = self.tokens
        if side == "kwargs":
            return (), {str(place): tokens, **kwargs}
        args: list[Any] = []
        named: dict[str, Any] = {}
        straight = True
        for i, value in enumerate(self.args):
            name = self.names[i] if i < len(self.names) else None
            if i == place:
                value = tokens
            elif name in kwargs:
                straight = False
                continue
            elif name in counts:
                value = counts[str(name)]
            elif _holds_tensor(value):
                if name is None:
                    raise InputError(
                        f"the example has a tensor as argument {i} of forward, which these tokens "
                        "come without; give all arguments as a tuple."
                    )
                straight = False
                continue
            if straight:
                args.append(value)
            elif name is None:
                raise InputError("give all arguments of forward, as a tuple.")
            else:
                named[name] = value
        return tuple(args), {**named, **kwargs}

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        """Raise for keywords that forward would not take, or take and ignore."""
        for name in kwargs:
            if name in self.keywords:
                continue
            if not self.takes_more[1]:
                raise unknown_name(
                    "argument of forward", name, [*self.keywords, "return_type"],
                    hint=f"forward takes {', '.join(self.keywords)}.",
                )  # fmt: skip
            if name in NATIVE:
                raise InputError(
                    f"{name} is an argument of native models; a wrapped model would ignore it, so "
                    "it is refused. Leave it out (text with a BOS token: "
                    "model.to_tokens(text, prepend_bos=True))."
                )

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise for arguments that are missing or given twice."""
        if not args and not kwargs:
            raise InputError("no input was given; give token ids (batch, pos), or what it takes.")
        there = self.names[: len(args)]
        if twice := [name for name in there if name in kwargs]:
            raise InputError(f"{twice[0]} was given twice, by its place and by its name.")
        if len(args) > len(self.names) and not self.takes_more[0]:
            raise InputError(
                f"forward takes {len(self.names)} positional arguments "
                f"({', '.join(self.names) or 'none'}), given {len(args)}."
            )
        missing = [name for name in self.needed if name not in there and name not in kwargs]
        if missing:
            had = {*self.names[: len(self.args)], *self.kwargs}
            why = "which the example had" if missing[0] in had else "which have no default"
            raise InputError(
                f"forward needs {', '.join(missing)} too, {why}: give them by name, as in "
                f"model(tokens, {missing[0]}=...), or all arguments as a dict."
            )

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
        """A context in which no key-value cache is kept."""
        if self.cached != "config":
            yield
            return
        config: Any = module.config
        before, config.use_cache = config.use_cache, False
        try:
            yield
        finally:
            config.use_cache = before


def input_device(module: nn.Module) -> torch.device:
    """Where inputs belong: with the first parameter that is there."""
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


def _holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or has one in it."""
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    if is_dataclass(value) and not isinstance(value, type):
        return any(map(_holds_tensor, vars(value).values()))
    return isinstance(value, Tensor)


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
    kinds = {p.kind for p in parameters.values()}
    plain = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Inputs(
        tokens=tokens,
        args=args,
        kwargs=kwargs,
        cached=cached,
        names=tuple(p.name for p in plain if p.kind is not p.KEYWORD_ONLY),
        needed=tuple(p.name for p in plain if p.default is p.empty),
        keywords=tuple(p.name for p in plain if p.kind is not p.POSITIONAL_ONLY),
        takes_more=(
            inspect.Parameter.VAR_POSITIONAL in kinds,
            inspect.Parameter.VAR_KEYWORD in kinds,
        ),
    )
