"""Options of looking inside: of lenses, linear probes, interventions and orbits, each once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from loopscope.analysis.declaring import option


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
