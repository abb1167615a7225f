"""How models, states, blocks and tokens are written in a figure, and in the name of a file."""

import hashlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from matplotlib import font_manager

from loopscope.analysis.tables import model_record
from loopscope.names import UNTRAINED, block_number, state_number, trained_name

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
    visible = "".join(_WHITESPACE.get(c, c) for c in runs)
    if len(visible) > width:
        visible = visible[: width - 1] + "…"
    return printable(visible) or "∅"


def model_label(name: str) -> str:
    """Write a model's name as the paper does: +mesh, +anchor*; `@init` becomes (untrained).

    Args:
        name: The name in the tables.

    Returns:
        The label; names that are not the paper's stay as they are.
    """
    if name.endswith(UNTRAINED):
        stem = trained_name(name)
        return f"{_MODELS.get(stem, printable(stem))} (untrained)"
    return _MODELS.get(name, printable(name))


def untrained_stem(provenance: Mapping[str, Any], model: str) -> str | None:
    """Name the model whose untrained twin this is.

    Args:
        provenance: Of the tables.
        model: The name in the tables.

    Returns:
        The name without `@init`, the name itself where only its provenance tells, or None where
        it is trained.
    """
    return trained_name(model) if model_record(provenance, model).untrained else None


def variants(provenance: Mapping[str, Any], models: Iterable[str]) -> dict[str, str | None]:
    """Tell the variant of each model, from its configuration or its name in the zoo.

    Args:
        provenance: Of the tables.
        models: Names in the tables.

    Returns:
        model → variant id; None where it is a foreign model, or nothing tells.
    """
    variant_of: dict[str, str | None] = {}
    for model in models:
        record = model_record(provenance, model)
        variant, stem = record.config.get("variant"), trained_name(model)
        by_name = stem if not record.values and stem in _MODELS else None
        variant_of[model] = str(variant) if variant else by_name
    return variant_of


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


def block_label(block: str, paths: Sequence[str] = ()) -> str:
    """Write a block's name: `core2` becomes '2nd core', or its path where the loop has paths.

    Args:
        block: The name in the table.
        paths: Where each iteration stands in nested loops, such as `H0.L1`.

    Returns:
        The label; prelude, coda and foreign names stay as they are.
    """
    t = block_number(block)
    if t is None:
        return printable(block)
    return printable(paths[t]) if t < len(paths) else f"{ordinal(t + 1)} core"


def state_label(state: str) -> str:
    """Write a state as a symbol: h_emb, h(0) … h(K), h_out.

    Args:
        state: The name in the table (`h0` for h(0)).

    Returns:
        The symbol as mathtext; foreign names stay as they are.
    """
    if (t := state_number(state)) is not None:
        return rf"$h({t})$"
    if state in ("h_emb", "h_out"):
        return rf"$h_\mathrm{{{state[2:]}}}$"
    return printable(state)


def source_label(source: str, paths: Sequence[str] = ()) -> str:
    """Write a source of alpha: the embedding, the prelude's or a core iteration's output.

    Args:
        source: `h_emb`, `prelude` or `core1` … `coreK`.
        paths: Where each iteration stands in nested loops.

    Returns:
        The label.
    """
    return state_label(source) if source.startswith("h_") else block_label(source, paths)


def step_label(t: int, paths: Sequence[str] = ()) -> str:
    """Write a step of the loop: 'transition' for t = −1, else t = 0 … K−1 or its path.

    Args:
        t: The step.
        paths: Where each iteration stands in nested loops.

    Returns:
        The label.
    """
    if t < 0:
        return "transition"
    return printable(paths[t]) if t < len(paths) else f"$t={t}$"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Make a safe part of a file name for each model, never the same for two.

    Letters, digits, `.`, `_`, `+`, `-` and `@` stay; anything else becomes `-`, and the name then
    gets six digits of its SHA-256, as do names that differ only in case or are very long.

    Args:
        names: The models' names.

    Returns:
        name → part of a file name.
    """
    unique = list(dict.fromkeys(names))
    folded = [name.casefold() for name in unique]
    safe = {}
    for name in unique:
        plain = re.sub(f"[^{re.escape(SAFE)}]+", "-", name)[:60].strip("-")
        if plain != name or folded.count(name.casefold()) > 1:
            plain = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")
        safe[name] = plain
    return safe


def loop_file_names(cases: Iterable[tuple[str, str | None]]) -> dict[tuple[str, str | None], str]:
    """Make a safe part of a file name for each loop of each model, never the same for two.

    Args:
        cases: Model and loop; the loop is None where the model has but one.

    Returns:
        (model, loop) → `file_names` of the model, with `_` and the loop's name after it where
        there are several; with six digits of a SHA-256 where that is another's name.
    """
    unique = list(dict.fromkeys(cases))
    models = file_names(model for model, _ in unique)
    loops = file_names(loop for _, loop in unique if loop is not None)
    named = {(m, p): models[m] if p is None else f"{models[m]}_{loops[p]}" for m, p in unique}
    folded = [name.casefold() for name in named.values()]
    for (model, loop), name in named.items():
        if loop is not None and folded.count(name.casefold()) > 1:
            digest = hashlib.sha256(f"{model}\0{loop}".encode()).hexdigest()[:6]
            named[model, loop] = f"{name}-{digest}"
    return named
