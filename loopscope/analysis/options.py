"""Options of measuring and comparing: each with its default, its check and its words, once.

`measure`, `compare`, their signatures and the command line read these declarations.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from loopscope.analysis.declaring import option
from loopscope.analysis.inside_options import (
    INSIDE,
    InterveneOptions,
    LensOptions,
    OrbitOptions,
    ProbeOptions,
    recorded,
)
from loopscope.analysis.tables import COMPARED, DEFAULT, MEASURES
from loopscope.errors import InputError, unknown_name, whole_number
from loopscope.names import MIN_TOKENS

F = TypeVar("F", bound=Callable[..., Any])


def read_loops(text: str | None) -> int | dict[str, int] | None:
    """Read the value of --loops: a number, or numbers by loop name.

    Args:
        text: `8`, or `H=2,L=3`.

    Returns:
        The number or numbers; None for None.

    Raises:
        InputError: for anything else.
    """
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    named = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if all(name and value.isdecimal() for name, value in named.items()):
        return {name: int(value) for name, value in named.items()}
    raise InputError(f"--loops takes a number, or numbers by loop name (H=2,L=3), given {text!r}.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        measures: Which of `registry.MEASURES`.
        kernels: Kernels of the CKA, `rbf` and/or `linear`.
        bandwidth: t of the RBF kernel, as a fraction of sqrt(median(d²)).
        drop_first: Tokens left out at the start of each sample (in all tables but loss, readout and
            tokens).
        center: Subtract each state's mean over the tokens before spectrum and ranks.
        normalize_rows: Scale each token's state to norm 1 before CKA, spectrum and ranks.
        more_loops: T, iterations of the main loop to run besides its own K, for delta and readout;
            models that do not allow it are measured up to K (`notes` says so).
        refit_coda: Steps in which the coda is refitted to every state, on top of its map, for the
            fitted reading; 0 leaves the coda as it is.
        loss: Function of (what the model returns, the batch it was given) to a number for each
            sample, in any unit, in place of the next tokens' cross-entropy; it fills the tables
            loss (asked for with it) and readout.
        lens: How lenses read states: `LensOptions`, or a dict of its fields.
        probe: What linear probes are fitted to: `ProbeOptions`, or a dict of its fields.
        intervene: Where and how to intervene: `InterveneOptions`, or a dict of its fields.
        orbit: How paths are followed: `OrbitOptions`, or a dict of its fields.

    Raises:
        UnknownNameError: for a measure that does not exist, with near matches.
        InputError: for no measures, no kernels, a negative `drop_first`, or a loss that is no
            function or that the coda should be refitted by.
    """

    measures: Sequence[str] = option(DEFAULT)
    kernels: Sequence[str] = option(("rbf",))
    bandwidth: float = option(1.0)
    drop_first: int = option(0, "--drop-first", "Leave out each window's first tokens (sinks).")
    center: bool = option(False, "--center", "Centre the states before spectra and ranks.")
    normalize_rows: bool = option(
        False, "--normalize-rows", "Scale each token's state to norm 1 first."
    )
    more_loops: int | None = option(
        None,
        "--more-loops",
        "Iterations to try beyond a model's own, where it allows more (default: twice as many; 0: "
        "none).",
    )
    refit_coda: int = option(
        0, "--refit-coda", "Steps of refitting the coda to each state, for the fitted reading."
    )
    loss: Any = option(None)
    lens: Any = option(LensOptions())
    probe: Any = option(ProbeOptions())
    intervene: Any = option(InterveneOptions())
    orbit: Any = option(OrbitOptions())

    def __post_init__(self) -> None:
        for name, kind in INSIDE.items():
            object.__setattr__(self, name, _built(kind, getattr(self, name), name))
        for name in ("measures", "kernels"):
            chosen = getattr(self, name)
            names = (chosen,) if isinstance(chosen, str) else tuple(dict.fromkeys(chosen))
            object.__setattr__(self, name, names)
        for name in self.measures:
            if name not in MEASURES:
                raise unknown_name("measure", name, MEASURES)
        if not self.measures:
            raise InputError(f"no measures asked for; choose from {', '.join(MEASURES)}.")
        if self.drop_first < 0:
            raise InputError(f"drop_first is {self.drop_first}; it must be 0 or more.")
        if self.more_loops is not None:
            more_loops = int(self.more_loops)
            object.__setattr__(self, "more_loops", more_loops)
        object.__setattr__(self, "refit_coda", whole_number("refit_coda", self.refit_coda, 0))
        if not self.kernels:
            raise InputError("no kernels asked for; choose rbf, linear or both.")
        if self.loss is not None:
            self._check_loss()

    def _check_loss(self) -> None:
        if not callable(self.loss):
            raise InputError(
                f"loss must be a function of (output, batch), given {type(self.loss).__name__}."
            )
        if self.refit_coda:
            raise InputError(
                "the coda is refitted by the cross-entropy of next tokens; leave refit_coda or "
                "loss out."
            )
        if "loss" not in self.measures:
            object.__setattr__(self, "measures", (*self.measures, "loss"))

    def of_samples(self, numbers: Sequence[int]) -> "Options":
        """Give the options for some of the samples.

        Args:
            numbers: Which.

        Returns:
            The same with labels, sources, answers and counted tokens of these.
        """
        return replace(
            self, lens=self.lens.chosen(numbers), probe=self.probe.chosen(numbers),
            intervene=self.intervene.chosen(numbers),
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """What provenance keeps of them, as JSON values; of a loss its name."""
        values = {name: getattr(self, name) for name in _names(Options)}
        if self.loss is not None:
            values["loss"] = getattr(self.loss, "__name__", type(self.loss).__name__)
        inside = {name: recorded(values.pop(name)) for name in INSIDE}
        return values | {name: inside[name] for name in INSIDE if name in self.measures}


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What `compare` measures and how, apart from the targets.

    Attributes:
        layout: Groups the layers of the models without a loop into virtual blocks; models with a
            loop keep theirs.
        loops: Iterations to run, as in `load`; native models without a loop stay as they are.
        spec: How the foreign models among the targets loop, as in `load`.
        example: What the forward of the foreign models among the targets is given, as in `load`.
        trust_remote_code: Whether Python code that came with a checkpoint may run.
        device_map: Spreads the foreign models among the targets over devices, as in `load`.
        text: One text to measure on, of whatever length, in place of `data`.
        data: Text or tokens to measure on, or a list or data set of items, each what the models'
            forward takes for one sample; the shipped held-out samples when not given.
        samples: Windows to measure.
        tokens: Tokens per window.
        device: Where loaded models go; the CPU when not given.
        dtype: Floating type of loaded models; float32 when not given.
        batch_size: Windows per forward pass.
        seed: Chooses the windows, and the weights of untrained twins.
        more_loops: Iterations to run besides a model's own, for `delta` and `readout` where the
            model allows it; twice its own when not given, 0 for none.

    Raises:
        InputError: for a value that cannot be, as of `Options`; fewer than 1 sample, 4 tokens or 1
            sample per batch; `more_loops` below 0.
    """

    measures: Sequence[str] = option(COMPARED)
    layout: str | None = option(
        None, "--layout", "Groups the layers of a model without a loop, e.g. 4+8+8+4."
    )
    loops: int | Mapping[str, int] | None = option(
        None,
        "--loops",
        "Iterations to run, where the model allows it: 8, or H=2,L=3.",
        typed=str | None,
        read=read_loops,
    )
    spec: str | Path | Mapping[str, Any] | None = option(
        None,
        "--spec",
        "How a foreign model loops (TOML; see inspect --write-spec).",
        typed=Path | None,
    )
    example: Any = option(
        None,
        "--example",
        "What a foreign model's forward is given, to find its loop: .npy (an array) or .pt (a "
        "tensor, a tuple or a dict). A factory may return (model, example) instead.",
        typed=Path | None,
    )
    trust_remote_code: bool = option(
        False, "--trust-remote-code", "Run Python code that came with a checkpoint."
    )
    device_map: Any = option(
        None,
        "--device-map",
        "Spread a Hugging Face model over devices, e.g. auto.",
        typed=str | None,
    )
    data: Any = option(
        None,
        "--data",
        ".txt, .jsonl or .parquet (column `text`), or integer .npy (samples × tokens). "
        "Default: the shipped held-out samples.",
        typed=str | None,
    )
    text: str | None = option(None, "--text", "One text to look into, in place of --data.")
    samples: int = option(500, "--samples", "Windows of text to measure.")
    tokens: int = option(256, "--tokens", "Tokens per window.")
    device: str | None = option(None, "--device", "cpu, cuda, cuda:0, mps …")
    dtype: str | None = option(None, "--dtype", "float32 (default), float64, bfloat16, float16.")
    batch_size: int = option(16, "--batch-size", "Windows per forward pass.")
    seed: int = option(0, "--seed", "Chooses windows and @init weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        put = object.__setattr__  # numpy's integers become Python's: they are written as JSON
        put(self, "samples", whole_number("samples", self.samples, 1))
        put(self, "tokens", whole_number("tokens", self.tokens, MIN_TOKENS))
        put(self, "batch_size", check_batch_size(self.batch_size))
        if self.text is not None and self.data is not None:
            raise InputError("text and data were both given; give one of them.")
        if self.more_loops is not None and self.more_loops < 0:
            raise InputError(f"more_loops must be 0 or more, given {self.more_loops}.")

    def options(self, *, more_loops: int | None) -> Options:
        """Give those of measuring one model.

        Args:
            more_loops: T, iterations of its main loop to run; None for its own.

        Returns:
            The options.
        """
        values = {name: getattr(self, name) for name in _names(Options)}
        return Options(**{**values, "more_loops": more_loops})


def check_batch_size(batch_size: int) -> int:
    """Refuse a number of samples that is none.

    Args:
        batch_size: Samples per forward pass.

    Returns:
        The same number, as Python's own integer.

    Raises:
        InputError: below 1, or for what is no whole number.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    return whole_number("batch_size", batch_size, 1)


def _built(kind: type, value: Any, name: str) -> Any:
    """Options that were given as such, or as a dict of their fields."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return build_options(kind, value, name)
    raise InputError(
        f"{name} takes {kind.__name__} or a dict of its fields, given {type(value).__name__}."
    )


def _names(kind: type) -> list[str]:
    return [entry.name for entry in fields(kind)]


def build_options(
    kind: type, keywords: Mapping[str, Any], caller: str, besides: Sequence[str] = ()
) -> Any:
    """Build options from the keywords of a call.

    Args:
        kind: `Options` or `Settings`.
        keywords: The keywords.
        caller: The function that takes them, for the message.
        besides: Further keywords of it, for near matches.

    Returns:
        An instance of `kind`.

    Raises:
        UnknownNameError: for a keyword that does not exist, with near matches.
        InputError: for a value that cannot be.
    """
    names = _names(kind)
    for name in keywords:
        if name not in names:
            raise unknown_name(f"option of {caller}", name, [*besides, *names])
    return kind(**keywords)


def takes(kind: type, *, but: Sequence[str] = ()) -> Callable[[F], F]:
    """Show the fields of a dataclass in the signature and help of a function that takes them.

    Args:
        kind: `Options` or `Settings`.
        but: Fields that the function declares itself.

    Returns:
        A decorator for a function with `**options`.
    """

    def with_signature(function: F) -> F:
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[:-1]
        parameters += [
            inspect.Parameter(
                entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default,
                annotation=entry.type,
            )
            for entry in fields(kind)
            if entry.name not in but
        ]  # fmt: skip
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        shown = [words for name, words in _words(kind).items() if name not in but]
        # in place of what the docstring says of its **keywords
        function.__doc__ = re.sub(
            r" {8}\*\*\w+: .*\n(?: {9,}.*\n)*", "".join(shown), function.__doc__ or "", count=1
        )
        return function

    return with_signature


def _words(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, as lines of `Args`."""
    words: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        attributes = (base.__doc__ or "").partition("    Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.finditer(r" {8}(\w+): .*\n(?: {9,}.*\n)*", f"{attributes}\n"):
            words[entry[1]] = entry[0]
    return words


__all__ = [
    "Options", "Settings", "build_options", "check_batch_size", "option", "read_loops", "takes",
]  # fmt: skip
