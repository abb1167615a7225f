"""How models, states, blocks and tokens are written in a figure, and in the name of a file."""

import hashlib
import re
import string
from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager

_MODELS = {
    "base": "base",
    "residual": "+residual",
    "anchor": "+anchor",
    "anchor_emb": "+anchor*",
    "mesh": "+mesh",
}
SAFE = string.ascii_letters + string.digits + "._+-@"
"""Characters that may stand in a file name anywhere."""

_WHITESPACE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "\\r"}
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@cache
def _glyphs() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def printable(text: str) -> str:
    """Write a string so that the figures' font can draw it: other characters become \\uXXXX.

    Args:
        text: Any string.

    Returns:
        The string without characters that have no glyph, `$` escaped (it would start a formula).
    """
    drawn = "".join(
        c if c.isprintable() and ord(c) in _glyphs() else f"\\u{ord(c):04x}" for c in text
    )
    return drawn.replace("$", r"\$")


def token_label(text: str, width: int = 10) -> str:
    """Write a token on one line with its whitespace visible.

    Args:
        text: The decoded token.
        width: Characters to show at most.

    Returns:
        ␣ for a space, ↵ for a line feed, ⇥ for a tab, `␣⁸` for a run of eight, ∅ for an empty
        token; cut with … when long.
    """
    runs = re.sub(
        r"([ \n\t])\1{2,}",
        lambda m: _WHITESPACE[m[1]] + str(len(m[0])).translate(_RAISED),
        text,
    )
    seen = "".join(_WHITESPACE.get(c, c) for c in runs)
    if len(seen) > width:
        seen = seen[: width - 1] + "…"
    return printable(seen) or "∅"


def model_label(name: str) -> str:
    """Write a model's name as the paper does: +mesh, +anchor*; `@init` becomes (untrained).

    Args:
        name: The name in the tables.

    Returns:
        The label; names that are not the paper's stay as they are.
    """
    stem, at, suffix = name.rpartition("@")
    if at and suffix == "init":
        return f"{_MODELS.get(stem, printable(stem))} (untrained)"
    return _MODELS.get(name, printable(name))


def variant_label(variant: str, *, shared: bool = True) -> str:
    """Write a variant as the paper does: +mesh, +anchor*, +residual+anchor.

    Args:
        variant: Its name in a configuration.
        shared: Whether the core iterations of its layout share their layers.

    Returns:
        The label; a memory between layers that are not shared is the paper's vanilla+mesh.
    """
    if variant == "mesh" and not shared:
        return "vanilla+mesh"
    terms = variant.split("+")
    label = "".join(_MODELS.get(term, term) for term in terms)
    label = label if len(terms) == 1 else "+" + label.lstrip("+")
    return printable(label) + ("" if shared or variant == "vanilla" else " (unshared)")


def short_count(value: int | float) -> str:
    """Write a number of tokens or parameters: 0, 20k, 1.25M, 250B.

    Args:
        value: The number, not negative.

    Returns:
        At most six digits, with the largest unit below it.
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def ordinal(number: int) -> str:
    """Write 1st, 2nd, 3rd, 4th, 11th, 21st.

    Args:
        number: A positive integer.

    Returns:
        The English ordinal.
    """
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 10 <= number % 100 <= 20 else ending}"


def block_label(block: str) -> str:
    """Write a block's name: `core2` becomes '2nd core'.

    Args:
        block: The name in the table.

    Returns:
        The label; prelude, coda and foreign names stay as they are.
    """
    core = re.fullmatch(r"core(\d+)", block)
    return f"{ordinal(int(core[1]))} core" if core else printable(block)


def state_label(state: str) -> str:
    """Write a state as a symbol: h_emb, h(0) … h(K), h_out.

    Args:
        state: The name in the table (`h0` for h(0)).

    Returns:
        The symbol as mathtext; foreign names stay as they are.
    """
    loop = re.fullmatch(r"h(\d+)", state)
    if loop:
        return rf"$h({loop[1]})$"
    if state in ("h_emb", "h_out"):
        return rf"$h_\mathrm{{{state[2:]}}}$"
    return printable(state)


def source_label(source: str) -> str:
    """Write a source of alpha: the embedding, the prelude's or a core iteration's output.

    Args:
        source: `h_emb`, `prelude` or `core1` … `coreK`.

    Returns:
        The label.
    """
    return state_label(source) if source.startswith("h_") else block_label(source)


def step_label(t: int) -> str:
    """Write a step of the loop: 'transition' for t = −1, else t = 0 … K−1.

    Args:
        t: The step.

    Returns:
        The label.
    """
    return "transition" if t < 0 else f"$t={t}$"


def state_order(states: Iterable[str]) -> list[str]:
    """Put states in the order of computation: h_emb, h0 … hK, foreign names as met, h_out.

    Args:
        states: Names, repetitions allowed.

    Returns:
        Each name once.
    """

    def key(state: str) -> tuple[int, int]:
        loop = re.fullmatch(r"h(\d+)", state)
        place = {"h_emb": 0, "h_out": 3}.get(state, 1 if loop else 2)
        return place, int(loop[1]) if loop else 0

    return sorted(dict.fromkeys(states), key=key)


def block_order(blocks: Iterable[str]) -> list[str]:
    """Put blocks (or sources) in the order of computation: h_emb, prelude, cores, others, coda.

    Args:
        blocks: Names, repetitions allowed.

    Returns:
        Each name once.
    """

    def key(block: str) -> tuple[int, int]:
        core = re.fullmatch(r"core(\d+)", block)
        place = {"h_emb": 0, "prelude": 1, "coda": 4}.get(block, 2 if core else 3)
        return place, int(core[1]) if core else 0

    return sorted(dict.fromkeys(blocks), key=key)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Make a safe part of a file name for each model, never the same for two.

    Letters, digits, `.`, `_`, `+`, `-` and `@` stay; anything else becomes `-`, and the name then
    gets six digits of its SHA-256, as do names that differ only in case or are very long.

    Args:
        names: The models' names.

    Returns:
        name → part of a file name.
    """
    wanted = list(dict.fromkeys(names))
    folded = [name.casefold() for name in wanted]
    safe = {}
    for name in wanted:
        plain = re.sub(f"[^{re.escape(SAFE)}]+", "-", name)[:60].strip("-")
        if plain != name or folded.count(name.casefold()) > 1:
            plain = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")
        safe[name] = plain
    return safe
