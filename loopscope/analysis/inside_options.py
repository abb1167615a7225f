"""Options of looking inside: of lenses, linear probes, interventions and orbits, each once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from loopscope.analysis.declaring import option
from loopscope.errors import InputError, unknown_name, whole_number


WAYS = ("skip", "zero", "mean", "resample", "patch", "erase")
"""How something inside a model can be replaced."""


def _listed(text: str | None) -> tuple[str, ...]:
    """What was typed with commas between; nothing where nothing was."""
    return () if text is None else tuple(part for part in text.split(",") if part.strip())


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """How states are read by lenses.

    Attributes:
        kinds: `logit` (final norm and unembedding) and/or `coda` (the coda before them).
    """

    kinds: Sequence[str] = option(("logit", "coda"))


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What linear probes are fitted to.

    Attributes:
        labels: Names of built-in labels, or name → an array with one label per token or sample.
    """

    labels: Any = option(None)


@dataclass(frozen=True, kw_only=True)
class InterveneOptions:
    """Where and how a model is intervened on.

    Attributes:
        what: Kinds of places (`iteration`, `attention`, `mlp`, `slot`, `write`, `read`, `edge`,
            `head`), places by name (`loop1`, `loop1.attn`, `m2@1`, `read m2@1`, `h_m0>h2`), or
            several at once (`loop1+m2@1`). When not given all kinds but heads, attention and MLP of
            whole iterations.
        how: `skip`, `zero`, `mean`, `resample`, `patch`, `erase`, or several. When not given each
            kind's own: iterations are skipped, writes and reads set to 0, the others replaced by
            their mean over other texts; with `source` all are patched, with `labels` erased.
        source: Tokens (samples, pos): window i is patched with what stands there in source i.
        answers: The token that should follow each window (samples,) if the source's value stood
            there, or each of its tokens (samples, pos), -100 where none is asked for.
        labels: What `erase` takes away: one label per token (samples, pos) or per window
            (samples,).
        windows: How many windows to measure, of as many documents as can be; when not given as many
            as about 1,200 forward passes allow, at least 12; all where there is a source.
        seed: Chooses the windows to resample from, and the random directions beside erased ones.

    Raises:
        InputError: for ways that do not exist, no places, or fewer than 1 window.
    """

    what: Sequence[str] = option(
        (),
        "--what",
        "Kinds of places (iteration, attention, mlp, slot, write, read, edge, head), places "
        "(loop1.attn, m2@1, 'read m2@1', h_m0>h2), several at once with +; separated by commas.",
        typed=str | None,
        read=_listed,
    )
    how: Sequence[str] = option(
        (),
        "--how",
        "skip, zero, mean, resample, or several, separated by commas; default: each kind's own.",
        typed=str | None,
        read=_listed,
    )
    source: Any = option(None)
    answers: Any = option(None)
    labels: Any = option(None)
    windows: int | None = option(
        None, "--windows", "Windows to intervene on (default: what about 1,200 passes allow)."
    )
    seed: int = option(0)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("what", "how"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else tuple(given)
            put(self, name, tuple(dict.fromkeys(entry.strip() for entry in given)))
        for how in self.how:
            if how not in WAYS:
                raise unknown_name("way to intervene", how, WAYS)
        if any(not part.strip() for what in self.what for part in what.split("+")):
            raise InputError(f"what={list(self.what)} has an empty name; leave it out.")
        if self.windows is not None:
            put(self, "windows", whole_number("windows", self.windows, 1))
        put(self, "seed", whole_number("seed", self.seed, 0))


@dataclass(frozen=True, kw_only=True)
class OrbitOptions:
    """How the paths of states are followed."""


INSIDE: dict[str, type] = {
    "lens": LensOptions, "probe": ProbeOptions, "intervene": InterveneOptions,
    "orbit": OrbitOptions,
}  # fmt: skip
"""Field of `Options` → the class of its value."""


def recorded(value: Any) -> Any:
    """Turn the value of an option into what provenance keeps of it.

    Args:
        value: A plain value, a dataclass of options, a mapping, a sequence, or an array.

    Returns:
        JSON values; of an array its shape and hash.
    """
    if type(value) in INSIDE.values():
        return {entry.name: recorded(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): recorded(part) for name, part in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return list(value)
    array = np.asarray(value)
    if array.dtype.kind == "O":
        return str(value)
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": content}


__all__ = [
    "INSIDE", "InterveneOptions", "LensOptions", "OrbitOptions", "ProbeOptions", "recorded",
]  # fmt: skip
