"""Naming: short names for loops that stand beside or inside each other."""

import re
import string
from collections.abc import Sequence

_PLAIN = re.compile(r"_?(module|level|block|layer|stack|loop|core|group)s?$", re.IGNORECASE)


def letter(number: int) -> str:
    """A, B, C, … for the loops of a model, in order."""
    return string.ascii_uppercase[number % 26] * (1 + number // 26)


def short_name(modules: Sequence[str]) -> str | None:
    """A short name of a loop's modules: `H` for `model.H_module`.

    Args:
        modules: Names of the modules that the loop repeats.

    Returns:
        At most six letters, or None where the modules suggest nothing.
    """
    if len(modules) != 1:
        return None
    last = [part for part in modules[0].split(".") if not part.isdigit()][-1:]
    name = _PLAIN.sub("", last[0]) if last else ""
    return name if 0 < len(name) <= 6 and name.isalpha() else None
