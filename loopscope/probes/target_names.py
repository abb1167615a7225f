"""Names that users give: what probes are fitted to, ways to intervene; needs no torch."""

import re
from collections.abc import Iterable

TARGETS = {
    "h": "states", "h_m": "core outputs", "m": "memory slots", "w_write": "write routers",
    "w_read": "read routers",
}  # fmt: skip
"""Kinds of targets and what they are."""


HOWS = ("skip", "zero", "mean", "resample", "patch", "erase")
"""How something inside a model is replaced."""


def target_kind(name: str) -> str:
    """Tell the kind of a target.

    Args:
        name: A target, or what several are asked for by.

    Returns:
        One of `TARGETS`.
    """
    return "h" if name in ("h_emb", "h_out") else re.sub(r"@?-?\d+", "", name)


def answers(asked: str, target: str) -> bool:
    """Tell whether a target is asked for by a name.

    Args:
        asked: A kind, a slot, or a single target.
        target: A single one.

    Returns:
        Whether it is: a target by its own name, a slot by that without its time, all by their kind.
    """
    return asked in (target, target.partition("@")[0], target_kind(target))


_ASKED = re.compile(r"h(_emb|_out|\d+)?|h_m\d*|m(\d+(@-?\d+)?)?|w_(write|read)(@-?\d+)?")


def check_targets(of: Iterable[str]) -> str | None:
    """Tell which name cannot be a target of any model.

    Args:
        of: As of `targets`.

    Returns:
        The first, or None.
    """
    return next((name for name in of if not _ASKED.fullmatch(name)), None)


__all__ = ["HOWS", "TARGETS", "answers", "check_targets", "target_kind"]
