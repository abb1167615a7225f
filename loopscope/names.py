"""Names of states, blocks, loops and untrained twins, and how names are ordered and told apart.

The tables, the figures, the models and the command line take them from here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

MAIN_LOOP = "core"
"""Name of a model's only loop."""

UNTRAINED = "@init"
"""What the name of an untrained twin ends in."""

KEYS = ["model", "step", "loop"]
"""The columns that tell checkpoints and their loops apart, in every table of measures."""

READINGS = ("raw", "matched", "fitted")
"""How a state is read out: as it is, at the length of h(K), through a fitted map."""

MIN_TOKENS = 4
"""The fewest tokens of a sample: the debiased CKA needs as many."""

FEWEST_DOCUMENTS = 8
"""With fewer documents there is nothing to resample: windows are taken as independent."""

_STATE = re.compile(r"h(\d+)")
_BLOCK = re.compile(r"core(\d+)")


def state_name(t: int) -> str:
    """Name the state h(t): `h0` enters the loop, `hK` leaves it.

    Args:
        t: Iterations done, 0 … K.

    Returns:
        The name in the tables.
    """
    return f"h{t}"


def state_names(K: int) -> list[str]:
    """Name the states of a loop, h(0) … h(K).

    Args:
        K: Iterations.

    Returns:
        K + 1 names, in order.
    """
    return [state_name(t) for t in range(K + 1)]


def state_number(name: str) -> int | None:
    """Tell t of a state h(t).

    Args:
        name: As `state_name` gives it.

    Returns:
        t; None for `h_emb`, `h_out` and anything else.
    """
    match = _STATE.fullmatch(name)
    return int(match[1]) if match else None


def block_name(t: int) -> str:
    """Name the block that iteration t is: `core1` is the first.

    Args:
        t: The iteration, 0 … K − 1.

    Returns:
        The name in the tables.
    """
    return f"core{t + 1}"


def block_number(name: str) -> int | None:
    """Tell t of a block.

    Args:
        name: As `block_name` gives it.

    Returns:
        The iteration t, from 0; None for prelude, coda and anything else.
    """
    match = _BLOCK.fullmatch(name)
    return int(match[1]) - 1 if match else None


def state_order(states: Iterable[str]) -> list[str]:
    """Put states in the order of computation: h_emb, h0 … hK, foreign names as met, h_out.

    Args:
        states: Names, repetitions allowed.

    Returns:
        Each name once.
    """

    def place(state: str) -> tuple[int, int]:
        t = state_number(state)
        return {"h_emb": 0, "h_out": 3}.get(state, 2 if t is None else 1), t or 0

    return sorted(dict.fromkeys(states), key=place)


def block_order(blocks: Iterable[str]) -> list[str]:
    """Put blocks (or sources of α) in the order of computation: h_emb, prelude, cores, rest, coda.

    Args:
        blocks: Names, repetitions allowed.

    Returns:
        Each name once.
    """

    def place(block: str) -> tuple[int, int]:
        t = block_number(block)
        return {"h_emb": 0, "prelude": 1, "coda": 4}.get(block, 3 if t is None else 2), t or 0

    return sorted(dict.fromkeys(blocks), key=place)


def twin_name(model: str) -> str:
    """Name the untrained twin of a model.

    Args:
        model: The model's name, or a target.

    Returns:
        The name with `@init` at its end, once.
    """
    return f"{trained_name(model)}{UNTRAINED}"


def trained_name(twin: str) -> str:
    """Name what an untrained twin is the twin of.

    Args:
        twin: A name, with or without `@init`.

    Returns:
        The name without it.
    """
    return twin.removesuffix(UNTRAINED)


def is_twin_name(name: str) -> bool:
    """Tell whether a name is that of an untrained twin.

    Args:
        name: A model's name or a target.

    Returns:
        Whether it ends in `@init`, after something else.
    """
    return name.endswith(UNTRAINED) and name != UNTRAINED


def natural_key(text: object) -> list[tuple[str, int]]:
    """Give a key that sorts as a person counts: `step-2` before `step-10`.

    Args:
        text: A name or path.

    Returns:
        Its runs of letters and numbers.
    """
    return [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", str(text))]


def distinct_labels(candidates: Sequence[Sequence[str]]) -> list[str]:
    """Choose a label for each, the shortest that is nobody else's.

    Args:
        candidates: For each what it may be called, the shortest first.

    Returns:
        One label each; equal ones only where all candidates are used up.
    """
    lengths = [0] * len(candidates)
    while True:
        labels = [names[length] for names, length in zip(candidates, lengths, strict=True)]
        counts = Counter(labels)
        longer = [
            i
            for i, label in enumerate(labels)
            if counts[label] > 1 and lengths[i] + 1 < len(candidates[i])
        ]
        if not longer:
            return labels
        for i in longer:
            lengths[i] += 1
