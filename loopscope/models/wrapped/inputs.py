"""Inputs: how a foreign forward is called, learned from the example."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopscope.errors import EXAMPLE, InputError, unknown_name
from loopscope.models.wrapped.token_places import (
    TARGETS,
    Place,
    copies_of_tokens,
    is_tokens,
    place_of_tokens,
    shifted,
)
from loopscope.text import usable_tokenizer, without_limits

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model's forward."""

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
        args, kwargs: The example's arguments; those that hold no tensors and were given by name, or
            that forward needs, are passed on in each call.
        cached: Whether forward takes `use_cache`, or the configuration has it.
        names: Positional parameters of forward, in order.
        needed: Its parameters without a default.
        keywords: All its parameters by name.
        takes_more: Whether it has `*args`, and whether it has `**kwargs`.
        copies: Arguments that each call's own tokens are passed along in: name to (shift, fill).
            Shift 0 are the tokens, −1 the next ones (after the last comes the first again), 1
            those before, with `fill` in front.
    """

    tokens: Place | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    cached: str | None = None
    names: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    takes_more: tuple[bool, bool] = (True, True)
    copies: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def complete(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counts: Mapping[str, int] | None = None,
    ) -> Arguments:
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
        if self.tokens is None and is_tokens(only):
            self._refuse_tokens()
        if self.tokens is not None and isinstance(only, Tensor):
            args, kwargs = self._around(only, kwargs, counts)
        by_place = self.names[: len(args)]
        needed = dict(zip(self.names, self.args, strict=False))
        needed = {name: value for name, value in needed.items() if name in self.needed}
        constant = {
            name: value
            for name, value in {**needed, **self.kwargs}.items()
            if name not in by_place and not holds_tensor(value)
        }
        set_counts = {name: value for name, value in counts.items() if name not in by_place}
        full = {**constant, **set_counts, **kwargs}
        full = {**self._along(args, full), **full}
        self._check(args, full)
        return args, self._without_cache(full)

    def example(self, counts: Mapping[str, int]) -> Arguments:
        """The example's arguments, with other numbers of iterations.

        Args:
            counts: Number by argument of forward.

        Returns:
            Positional and keyword arguments.
        """
        args = tuple(
            counts.get(self.names[i], value) if i < len(self.names) else value
            for i, value in enumerate(self.args)
        )
        by_place = self.names[: len(args)]
        more = {name: value for name, value in counts.items() if name not in by_place}
        return args, self._without_cache({**self.kwargs, **more})

    def with_tokens(self, arguments: Arguments, tokens: Tensor, targets: Tensor) -> Arguments:
        """Arguments with other tokens, which go along wherever tokens do.

        Args:
            arguments: Positional and keyword arguments that have tokens.
            tokens: Token ids, (batch, pos).
            targets: What stands for them where they are to be predicted, (batch, pos).

        Returns:
            The arguments.
        """
        assert self.tokens is not None
        args, kwargs = list(arguments[0]), dict(arguments[1])
        others = {
            name: shifted(targets if name in TARGETS else tokens, *shift)
            for name, shift in self.copies.items()
        }
        for i, name in enumerate(self.names[: len(args)]):
            args[i] = others.pop(name, args[i])
        kwargs |= {name: value for name, value in others.items() if name in kwargs}
        side, place = self.tokens
        if side == "args":
            args[int(place)] = tokens
        else:
            kwargs[str(place)] = tokens
        return tuple(args), kwargs

    def _along(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tokens of a call, for further arguments that they are passed along in."""
        if not self.copies or self.tokens is None:
            return {}
        tokens = self.tokens_at_place(args, kwargs)
        if tokens is None:
            return {}
        by_place = self.names[: len(args)]
        return {
            name: shifted(tokens, *shift)
            for name, shift in self.copies.items()
            if name not in by_place
        }

    def tokens_at_place(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The token ids where the example has them.

        Args:
            args: Positional arguments of forward.
            kwargs: Its keyword arguments.

        Returns:
            Token ids, (batch, pos); None where there are none.
        """
        if self.tokens is None:
            return None
        side, place = self.tokens
        by_place = dict(enumerate(args)) if side == "args" else {}
        value = by_place.get(int(place)) if side == "args" else kwargs.get(str(place))
        return value if is_tokens(value) else None

    def targeted(self, *, needed: bool = False) -> "Inputs | None":
        """The same, with the example's tokens as targets too.

        Args:
            needed: Whether only where forward needs them.

        Returns:
            The inputs; None where forward takes no targets or the example has them.
        """
        names = self.needed if needed else self.keywords
        given = {*self.names[: len(self.args)], *self.kwargs}
        takes = [name for name in TARGETS if name in names]
        if self.tokens is None or not takes or given & set(takes):
            return None
        tokens = self.tokens_in(self.args, self.kwargs)
        return replace(
            self,
            kwargs={**self.kwargs, takes[0]: tokens},
            copies={**self.copies, takes[0]: (0, 0)},
        )

    def _without_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"use_cache": False, **kwargs} if self.cached == "argument" else kwargs

    def _around(
        self, tokens: Tensor, kwargs: dict[str, Any], counts: Mapping[str, int]
    ) -> Arguments:
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
            elif holds_tensor(value):
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

    def _refuse_tokens(self) -> None:
        """Raise for token ids given to a model that was wrapped with tensors of floats alone."""
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
        if tensors and all(v.is_floating_point() for v in tensors):
            raise InputError(
                f"the model was wrapped without token ids: its example is {tuple(tensors[0].shape)}"
                f" of {str(tensors[0].dtype).removeprefix('torch.')}, so give what is like it."
            )

    def _check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise for arguments that are missing or given twice."""
        if not args and not kwargs:
            raise InputError("no input was given; give token ids (batch, pos), or what it takes.")
        by_place = self.names[: len(args)]
        if twice := [name for name in by_place if name in kwargs]:
            raise InputError(f"{twice[0]} was given twice, by its place and by its name.")
        if len(args) > len(self.names) and not self.takes_more[0]:
            raise InputError(
                f"forward takes {len(self.names)} positional arguments "
                f"({', '.join(self.names) or 'none'}), given {len(args)}."
            )
        missing = [name for name in self.needed if name not in by_place and name not in kwargs]
        if missing:
            in_example = {*self.names[: len(self.args)], *self.kwargs}
            why = "which the example had" if missing[0] in in_example else "which have no default"
            raise InputError(
                f"forward needs {', '.join(missing)} too, {why}: give them by name, as in "
                f"model(tokens, {missing[0]}=...), or all arguments as a dict."
            )

    def missing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
        """Arguments with tensors that the example had and a call has not.

        Args:
            args: Positional arguments of forward.
            kwargs: Its keyword arguments.

        Returns:
            Their names, in the example's order.
        """
        given = {*self.names[: len(args)], *kwargs}
        example = {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}
        return [name for name, v in example.items() if name not in given and holds_tensor(v)]

    def tokens_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The token ids among arguments that `complete` gave.

        Args:
            args: Positional arguments of forward.
            kwargs: Its keyword arguments.

        Returns:
            Token ids, (batch, pos).

        Raises:
            InputError: if the model takes none, or none were given.
        """
        if self.tokens is None:
            raise InputError("the model was wrapped without token ids, so there are no targets.")
        side, place = self.tokens
        tokens = (
            args[int(place)]
            if side == "args" and int(place) < len(args)
            else kwargs.get(str(place))
        )
        if tokens is None:
            tokens = next((v for v in (*args, *kwargs.values()) if is_tokens(v)), None)
        if tokens is None:
            raise InputError("no token ids (batch, pos) were given, so there are no targets.")
        return tokens

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        """A context in which no key-value cache is kept.

        Args:
            module: The model.

        Returns:
            The context.
        """
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
    """Where inputs belong: with the first parameter that has values, or else the first buffer.

    Args:
        module: The model.

    Returns:
        The device; the CPU where neither has any.
    """
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or has one in it.

    Args:
        value: Anything.

    Returns:
        Whether it is.
    """
    if isinstance(value, Mapping):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, tuple | list):
        return any(map(holds_tensor, value))
    if is_dataclass(value) and not isinstance(value, type):
        return any(map(holds_tensor, vars(value).values()))
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
    parameters = inspect.signature(module.forward).parameters
    config = getattr(module, "config", None)
    cached = None
    if "use_cache" in parameters:
        cached = "argument"
    elif getattr(config, "use_cache", None):
        cached = "config"
    kinds = {p.kind for p in parameters.values()}
    plain = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = tuple(p.name for p in plain if p.kind is not p.KEYWORD_ONLY)
    place = place_of_tokens(args, kwargs, names)
    return Inputs(
        tokens=place,
        copies={} if place is None else copies_of_tokens(args, kwargs, names, place),
        args=args,
        kwargs=kwargs,
        cached=cached,
        names=names,
        needed=tuple(p.name for p in plain if p.default is p.empty),
        keywords=tuple(p.name for p in plain if p.kind is not p.POSITIONAL_ONLY),
        takes_more=(
            inspect.Parameter.VAR_POSITIONAL in kinds,
            inspect.Parameter.VAR_KEYWORD in kinds,
        ),
    )


def checked_module(module: Any) -> nn.Module:
    """The module itself, checked.

    Args:
        module: What `wrap` was given.

    Returns:
        The module; the original of a compiled one.

    Raises:
        InputError: for what is no module, is scripted, or has no values yet.
    """
    if not isinstance(module, nn.Module):
        raise InputError(
            f"wrap takes a torch module, given {type(module).__name__}; ls.load opens names, "
            "folders and files."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            "this model was scripted or traced by torch.jit, and its forward calls no hooks; give "
            "the original module."
        )
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        warn(
            "this model was compiled; hooks in compiled code are ignored, so the original is "
            "wrapped and runs uncompiled.",
            stacklevel=3,
        )
        module = original
    scripted = [n for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"{scripted[0]} was scripted or traced by torch.jit, and its code calls no hooks; put "
            "the original module in its place."
        )
    lazy = [n for n, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise InputError(
            f"{len(lazy)} parameters have no shape yet (lazy modules), such as {lazy[0]}; run the "
            "model once on its input."
        )
    meta = [n for n, p in module.named_parameters() if p.device.type == "meta"]
    placed = any(hasattr(m, "_hf_hook") for m in module.modules())
    if meta and not placed:
        raise InputError(
            f"{len(meta)} parameters have no values (they are on the meta device), such as "
            f"{meta[0]}; load the weights first."
        )
    return module


def example_arguments(module: nn.Module, example: Any, tokenizer: Any) -> Arguments:
    """The example as arguments of forward.

    Args:
        module: The model.
        example: What `wrap` was given; None makes token ids up.
        tokenizer: For an example that is text; what `tokenizer_for` gave.

    Returns:
        Positional and keyword arguments.

    Raises:
        InputError: for an example that is no input, or where none can be made up.
    """
    if example is None:
        example = _drawn_tokens(module)
    if isinstance(example, str):
        if tokenizer is None:
            raise InputError("the example is text, and there is no tokenizer; give token ids.")
        tokenizer = without_limits(tokenizer)
        example = torch.tensor([tokenizer.encode(example, add_special_tokens=False).ids])
    if isinstance(example, list) and _is_numbers(example):
        example = _tensor(example).to(input_device(module))
    _refuse_empty(example)
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if not isinstance(example, Tensor):
        raise InputError(
            "example must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, given {type(example).__name__}."
        )
    if is_tokens(example):  # two samples: one cannot be told from what is made for all
        example = example[:2] if len(example) > 1 else example.repeat(2, 1)
    return (example,), {}


def _drawn_tokens(module: nn.Module) -> Tensor:
    """Random token ids (2, 8) that a model's embedding table has."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    get_table = getattr(module, "get_input_embeddings", None)
    try:
        table = get_table() if get_table is not None else None
    except (NotImplementedError, AttributeError):
        table = None
    rows = getattr(table, "num_embeddings", None) or min(
        (t.num_embeddings for t in tables), default=0
    )
    if not rows:
        raise InputError(
            f"the model has no embedding table, so no example can be made up; give {EXAMPLE}: what "
            "its forward takes, a tensor, a tuple or a dict of arguments."
        )
    drawn = torch.randint(rows, (2, 8), generator=torch.Generator().manual_seed(0))
    return drawn.to(input_device(module))


def _tensor(rows: list[Any]) -> Tensor:
    """Numbers, or rows of numbers, as a tensor with at least two axes."""
    try:
        numbers = torch.tensor(rows)
    except ValueError as error:
        raise InputError(f"the example's rows have unequal lengths ({error}).") from error
    return numbers if numbers.ndim > 1 else numbers[None]


def _refuse_empty(example: Any) -> None:
    values = [example] if isinstance(example, Tensor) else example
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, tuple | list) and any(
        isinstance(v, Tensor) and v.numel() == 0 for v in values
    ):
        raise InputError("the example is empty; give at least one sample with one token.")


def _is_numbers(value: Any) -> bool:
    """Whether a value is a number, or lists of numbers."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def tokenizer_for(module: nn.Module, tokenizer: Any) -> Any:
    """The tokenizer for a model: the one given, or else its attribute `tokenizer`.

    Args:
        module: The model.
        tokenizer: What `wrap` was given.

    Returns:
        A tokenizer as models use it; None where there is none. An attribute that is none gives a
        warning, unless it is a layer.

    Raises:
        InputError: if what was given is no tokenizer.
    """
    if tokenizer is not None:
        return usable_tokenizer(tokenizer)
    held = getattr(module, "tokenizer", None)
    if isinstance(held, nn.Module):
        return None
    try:
        return usable_tokenizer(held)
    except InputError as error:
        warn(
            f"{type(module).__name__}.tokenizer cannot be used, so the model takes token ids only: "
            f"{error}",
            stacklevel=4,
        )
    return None
