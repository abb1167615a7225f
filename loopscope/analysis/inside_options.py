"""Options of looking inside: of lenses, linear probes, interventions and orbits, each once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.analysis.declaring import option
from loopscope.errors import InputError, unknown_name, whole_number

_TUNED = "The tuned lens is asked for by tuned=True (--tuned)."


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """How states are read by lenses.

    Attributes:
        kinds: `logit` (final norm and unembedding) and/or `coda` (the coda before them).
        within: Read the stream after every layer of every iteration too.
        top_k: Tokens per state and position in the table `lens_tokens`.
        tuned: Fit the tuned lens too: an affine map per state, on other samples than it reads.
        tuned_folder: Folder in which the fitted maps of each model are kept and found again;
            implies `tuned`.

    Raises:
        UnknownNameError: for a lens that does not exist, with near matches.
        InputError: for no lens, or `top_k` below 1.
    """

    kinds: Sequence[str] = option(
        ("logit", "coda"), "--kind", "logit and/or coda (default: both).", typed=list[str]
    )
    within: bool = option(False, "--within", "Read after every layer of every iteration too.")
    top_k: int = option(5, "--top-k", "Tokens per state and position in the table of tokens.")
    tuned: bool = option(False, "--tuned", "Fit the tuned lens too: an affine map per state.")
    tuned_folder: str | Path | None = option(
        None, "--tuned-folder", "Keep the maps of the tuned lens here, or read them again.",
        typed=Path | None,
    )  # fmt: skip

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else tuple(dict.fromkeys(self.kinds))
        for kind in kinds:
            if kind not in ("logit", "coda"):
                raise unknown_name("lens", kind, ["logit", "coda"], hint=_TUNED)
        put = object.__setattr__
        put(self, "kinds", kinds)
        put(self, "top_k", whole_number("top_k", self.top_k, 1))
        put(self, "tuned", bool(self.tuned) or self.tuned_folder is not None)
        if not kinds and not self.tuned:
            raise InputError("no lens was asked for; choose logit, coda, or tuned=True.")


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
        what: Kinds of places, or places by name.
        how: Ways of intervening.
    """

    what: Sequence[str] = option(("iteration",))
    how: Sequence[str] = option(("skip",))


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
    if isinstance(value, Path):
        return str(value)
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
