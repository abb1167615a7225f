"""Errors that a user can act on: what was given, what is allowed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from operator import index
from typing import Any

EXAMPLE = (
    "example= (on the command line --example FILE, or a factory that returns (model, example))"
)
"""How an example is given, for messages that ask for one."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what would be."""


class LoopCountError(InputError):
    """A model runs its loop another number of times on this input than on its example."""


class UnknownNameError(InputError, KeyError):
    """A name that does not exist was asked for; the message lists near matches."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


def unknown_name(
    kind: str, name: object, allowed: Iterable[str], *, hint: str = ""
) -> UnknownNameError:
    """Build the error for a name that does not exist.

    Args:
        kind: What was looked up, in the singular ("hook name", "variant").
        name: The name that was given.
        allowed: All names that exist.
        hint: A closing sentence on what to do.

    Returns:
        The error, ready to be raised, with up to five near matches (or all names if they are few).
    """
    names = list(allowed)
    near = get_close_matches(str(name), names, n=5, cutoff=0.5)
    if near:
        choice = f"did you mean {', '.join(near)}?"
    elif len(names) <= 20:
        choice = f"there are: {', '.join(names) or 'none'}."
    else:
        choice = f"there are {len(names)}, such as {', '.join(names[:5])}."
    return UnknownNameError(f"unknown {kind} {str(name)!r}; {choice}{' ' + hint if hint else ''}")


def whole_number(name: str, value: Any, least: int) -> int:
    """Check a number that counts something.

    Args:
        name: What it is called.
        value: An integer of Python or numpy.
        least: The smallest that is allowed.

    Returns:
        The number as Python's own integer.

    Raises:
        InputError: for anything else, and below `least`.
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, given {value!r}.")
    return number
