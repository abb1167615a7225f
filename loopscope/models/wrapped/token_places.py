"""Token places: which arguments of a forward pass are token ids, and which are made of them."""

import re
from typing import Any

import torch
from torch import Tensor

Place = tuple[str, str | int]
"""Where token ids stand: `("args", 0)` or `("kwargs", "input_ids")`."""

TARGETS = ("targets", "target", "labels", "label", "lm_labels", "y")
"""Arguments of forward that take the tokens to be predicted."""

NOT_TOKENS = re.compile("mask|pos|type|segment|cache")
"""What is in the names of integer arguments of the tokens' shape that are no tokens."""


def is_tokens(value: Any) -> bool:
    """Whether a value can be token ids: integers (batch, pos).

    Args:
        value: Anything.

    Returns:
        Whether it can.
    """
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and not value.is_floating_point()
        and value.dtype != torch.bool
    )


def place_of_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> Place | None:
    """The first integers (batch, pos) of an example, rather those not called targets or masks.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        names: Positional parameters of forward, in order.

    Returns:
        Where the token ids stand; None where there are none.
    """
    named: list[tuple[Place, str]] = [
        (("args", i), names[i] if i < len(names) else "") for i in range(len(args))
    ]
    named += [(("kwargs", name), name) for name in kwargs]
    values = (*args, *kwargs.values())
    fits = [each for each, value in zip(named, values, strict=True) if is_tokens(value)]

    def unlikely(fit: tuple[Place, str]) -> tuple[bool, ...]:
        (side, _), name = fit
        other = name in TARGETS or NOT_TOKENS.search(name) is not None
        named = side == "kwargs"
        return other, named, named and name not in ("input_ids", "tokens", "idx")

    return min(fits, key=unlikely)[0] if fits else None


def copies_of_tokens(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...], place: Place
) -> dict[str, tuple[int, int]]:
    """Which further arguments are made of the tokens, and how: by their names and values.

    What is called targets or labels takes the tokens themselves where its values are neither they
    nor the next ones; the logits do not depend on it. Anything else (decoder_input_ids) counts
    where its values say so; masks, positions and types never do.

    Args:
        args: The example's positional arguments.
        kwargs: Its keyword arguments.
        names: Positional parameters of forward, in order.
        place: Where the token ids stand.

    Returns:
        Name to (shift, fill), as in `Inputs.copies`.
    """
    tokens: Tensor = args[int(place[1])] if place[0] == "args" else kwargs[str(place[1])]
    further = {**dict(zip(names, args, strict=False)), **kwargs}
    own = names[int(place[1])] if place[0] == "args" and int(place[1]) < len(names) else place[1]
    copies: dict[str, tuple[int, int]] = {}
    for name, value in further.items():
        if name == own or not is_tokens(value) or value.shape != tokens.shape:
            continue
        shift = _shift(tokens, value) if len(tokens.unique()) > 2 else None
        if name in TARGETS:
            copies[name] = shift or (0, 0)
        elif shift is not None and not NOT_TOKENS.search(name):
            copies[name] = shift
    return copies


def _shift(tokens: Tensor, value: Tensor) -> tuple[int, int] | None:
    """How a tensor is made of the tokens: (0, 0), shifted (−1, 0) or (1, fill), or None."""
    if torch.equal(value, tokens):
        return 0, 0
    if tokens.shape[1] > 2 and torch.equal(value[:, :-1], tokens[:, 1:]):
        return -1, 0
    begins = value[:, 0].unique()
    if tokens.shape[1] > 2 and len(begins) == 1 and torch.equal(value[:, 1:], tokens[:, :-1]):
        return 1, int(begins[0])
    return None


def shifted(tokens: Tensor, shift: int, fill: int) -> Tensor:
    """Tokens as `Inputs.copies` says.

    Args:
        tokens: Token ids, (batch, pos).
        shift: 0 for the tokens, −1 for the next ones, 1 for those before.
        fill: What stands before the first, (1 alone).

    Returns:
        Token ids, (batch, pos).
    """
    moved = tokens.roll(shift, dims=1) if shift else tokens
    if shift > 0:
        moved[:, 0] = fill
    return moved
