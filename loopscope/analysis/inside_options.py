"""Options of looking inside: of lenses, linear probes, interventions and orbits, each once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from loopscope.analysis.declaring import option
from loopscope.errors import unknown_name, whole_number
from loopscope.probes import TARGETS, check_targets, read_labels


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
        labels: Names of built-in labels (`current`, `previous` and `next` token's class,
            `position`, `indentation`, `brackets`) and files of labels; or name → an array with one
            label per token (samples × pos) or sample. Integers and strings are classes, floats
            numbers. `current`, `previous` and `next` when not given.
        of: What they are fitted to, h_emb besides: kinds (`h` states, `h_m` core outputs, `m`
            slots, `w_write` and `w_read` router weights), or single ones (`h2`, `m1@0`).
        folds: Parts that the documents are shared out in, each scored by probes fitted to the
            others.
        probed_tokens: The most tokens of a sample that are used, drawn at random.

    Raises:
        UnknownNameError: for labels or targets that do not exist, with near matches.
        InputError: for labels of a wrong form, fewer than 2 folds, or no tokens.
    """

    labels: Any = option(
        None,
        "--labels",
        "current,next,previous (class of a token), position, indentation, brackets; or a .npy, "
        ".csv or .parquet file with one label per token or sample. Default: the classes.",
        typed=str | None,
    )
    of: str | Sequence[str] = option(
        "h",
        "--of",
        "What probes are fitted to: h (states), h_m, m (slots), w_write, w_read, or single ones "
        "(h2, m1@0), with commas.",
        typed=str,
    )
    folds: int = option(5, "--folds", "Parts that the documents are shared out in.")
    probed_tokens: int = option(
        32, "--probed-tokens", "The most tokens of a sample that probes are fitted to."
    )

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "labels", read_labels(self.labels))
        names = self.of.split(",") if isinstance(self.of, str) else self.of
        put(self, "of", tuple(name.strip() for name in names))
        if (name := check_targets(self.of)) is not None:
            raise unknown_name("target of probes", name, TARGETS, hint="Or single ones: h2, m1@0.")
        put(self, "folds", whole_number("folds", self.folds, 2))
        put(self, "probed_tokens", whole_number("probed_tokens", self.probed_tokens, 1))

    def chosen(self, numbers: Sequence[int]) -> "ProbeOptions":
        """Give the options for some of the samples.

        Args:
            numbers: Which.

        Returns:
            The same with the labels of these.
        """
        if self.labels is None:
            return self
        labels = {
            name: None if values is None else values.chosen(numbers)
            for name, values in self.labels.items()
        }
        return replace(self, labels=labels)


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
