"""Options of looking inside: of lenses, linear probes, interventions and orbits, each once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopscope.analysis.declaring import option
from loopscope.errors import InputError, unknown_name, whole_number
from loopscope.probes import HOWS, TARGETS, check_targets


def _listed(typed: str | None) -> tuple[str, ...]:
    """Names with commas between them; none where nothing was typed."""
    return () if typed is None else tuple(name.strip() for name in typed.split(","))


def _labels(given: Any) -> Any:
    """Labels in whatever form they come; pandas is imported where there are some."""
    if given is None:
        return None
    from loopscope.probes import Labels, read_labels

    if isinstance(given, Mapping) and all(
        x is None or isinstance(x, Labels) for x in given.values()
    ):
        return given  # of other options
    return read_labels(given)


def _chosen_labels(labels: Any, numbers: Sequence[int]) -> Any:
    """The labels of some of the samples."""
    if labels is None:
        return None
    return {name: None if x is None else x.chosen(numbers) for name, x in labels.items()}


def _chosen_rows(given: Any, numbers: Sequence[int]) -> Any:
    """The rows of some of the samples, of an array or of something with `tokens`."""
    if given is None or isinstance(given, str):
        return given
    rows = np.asarray(getattr(given, "tokens", given))
    return rows[list(numbers)] if rows.ndim and len(rows) > max(numbers) else given


_TUNED = "The tuned lens is asked for by tuned=True (--tuned)."


def _where() -> Any:
    """The option that lenses and interventions share."""
    return option(
        None,
        "--where",
        "Count the predictions of one class of tokens alone: identifier, keyword, number, "
        "operator, string, comment, whitespace.",
        typed=str | None,
    )


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
        where: The predicted tokens that count: a class (`identifier`, `keyword`, `number`,
            `operator`, `string`, `comment`, `whitespace`), or booleans (samples × tokens); all when
            not given.

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
    where: Any = _where()

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

    def chosen(self, numbers: Sequence[int]) -> "LensOptions":
        """Give the options for some of the samples.

        Args:
            numbers: Which.

        Returns:
            The same with the counted tokens of these.
        """
        return replace(self, where=_chosen_rows(self.where, numbers))


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
        put(self, "labels", _labels(self.labels))
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
        return replace(self, labels=_chosen_labels(self.labels, numbers))


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
        labels: What `erase` takes away: one set of labels, as `probe` takes them.
        where: The predicted tokens that count, as of `lens`: a class, or booleans (samples ×
            tokens); all when not given.
        windows: How many windows to measure, of as many documents as can be; when not given as many
            as about 1,000 forward passes allow, at least 10; all where there is a source.
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
    labels: Any = option(
        None,
        "--labels",
        "What erase takes away: a built-in label (see probe), or a file of labels.",
        typed=str | None,
    )
    where: Any = _where()
    windows: int | None = option(
        None, "--windows", "Windows to intervene on (default: what about 1,000 passes allow)."
    )
    seed: int = option(0)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("what", "how"):
            given = getattr(self, name)
            given = (given,) if isinstance(given, str) else tuple(given)
            put(self, name, tuple(dict.fromkeys(entry.strip() for entry in given)))
        for how in self.how:
            if how not in HOWS:
                raise unknown_name("way to intervene", how, HOWS)
        if any(not part.strip() for what in self.what for part in what.split("+")):
            raise InputError(f"what={list(self.what)} has an empty name; leave it out.")
        put(self, "labels", _labels(self.labels))
        if self.labels is not None and len(self.labels) > 1:
            raise InputError(
                f"one set of labels is erased at a time, given {', '.join(self.labels)}; give one."
            )
        if self.windows is not None:
            put(self, "windows", whole_number("windows", self.windows, 1))
        put(self, "seed", whole_number("seed", self.seed, 0))

    def chosen(self, numbers: Sequence[int]) -> "InterveneOptions":
        """Give the options for some of the samples.

        Args:
            numbers: Which.

        Returns:
            The same with the sources, answers, labels and counted tokens of these.
        """
        return replace(
            self, source=_chosen_rows(self.source, numbers),
            answers=_chosen_rows(self.answers, numbers),
            labels=_chosen_labels(self.labels, numbers), where=_chosen_rows(self.where, numbers),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OrbitOptions:
    """How the paths of states are followed.

    Attributes:
        close_samples: Samples, evenly spaced, whose layers, attention patterns and read-outs (early
            exit) are followed too; the others have the steps of the state alone.
        contraction_samples: Samples, evenly spaced, whose iterations are differentiated; 0 for no
            contraction.
        power_steps: Steps of the power iteration.

    Raises:
        InputError: for numbers below 0, or no step.
    """

    close_samples: int = option(
        32, "--close-samples", "Samples whose layers, attention and early exits are followed."
    )
    contraction_samples: int = option(
        4, "--contraction-samples", "Samples whose iterations are differentiated; 0: none."
    )
    power_steps: int = option(8, "--power-steps", "Steps of the power iteration of contraction.")

    def __post_init__(self) -> None:
        for name, least in (("close_samples", 0), ("contraction_samples", 0), ("power_steps", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))


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
