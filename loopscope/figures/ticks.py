"""Which of many states, blocks and slots get a label where there is no room for all."""

import re
from collections.abc import Sequence

from matplotlib.text import Text

_NUMBERED = re.compile(r"(?:h|core|m)(\d+)")
_STEPS = tuple(base * 10**power for power in range(4) for base in (1, 2, 4, 5, 8))


def every(first: int, last: int, most: int) -> list[int]:
    """Numbers to label: the first, the last, and multiples of a round step between them.

    Args:
        first: The first number.
        last: The last.
        most: About how many may be labelled, at least 2.

    Returns:
        All where they fit, otherwise some that lie about evenly.
    """
    if last - first < most:
        return list(range(first, last + 1))
    step = next((s for s in sorted(_STEPS) if last - first <= s * (most - 1)), last - first)
    between = range(step, last, step)
    return [first, *(n for n in between if 4 * min(n - first, last - n) >= 3 * step), last]


def labelled(names: Sequence[str], most: int) -> list[str]:
    """Choose the names that get a label: all without a number, some of h0 … hK, core1 … coreK.

    Args:
        names: States, blocks or slots.
        most: About how many numbered ones may be labelled.

    Returns:
        The chosen names in order.
    """
    matches = {name: _NUMBERED.fullmatch(name) for name in names}
    number_of = {name: int(match[1]) for name, match in matches.items() if match}
    numbers = [number_of[name] for name in names if name in number_of]
    if len(numbers) <= most:
        return list(names)
    kept = set(every(min(numbers), max(numbers), most))
    return [name for name in names if name not in number_of or number_of[name] in kept]


def spread_ends(labels: Sequence[Text], **sides: tuple[str, str]) -> None:
    """Move the first and the last label outwards, away from close neighbours.

    Args:
        labels: The tick labels of an axis.
        **sides: The alignment (`ha` or `va`) of the first and of the last.
    """
    if not labels:  # of a panel whose neighbour has them
        return
    for side, (first, last) in sides.items():
        labels[0].set(**{side: first})
        labels[-1].set(**{side: last})
