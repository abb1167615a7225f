"""Declaring: an option as a field of a dataclass, with its flag and words."""

from collections.abc import Callable
from dataclasses import field
from typing import Any


def option(
    default: Any,
    flag: str = "",
    words: str = "",
    *,
    typed: Any = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Declare an option as a field of a dataclass.

    Args:
        default: Its value where nothing is said.
        flag: Its name on the command line, such as `--batch-size`; empty for an option that only
            Python has.
        words: What it does, as `--help` says it.
        typed: Its type on the command line, where that differs from the field's.
        read: Turns what was typed into the value.

    Returns:
        The field.
    """
    flags = {"flag": flag, "words": words, "typed": typed, "read": read}
    return field(default=default, metadata=flags)
