"""Looking inside: lenses, linear probes, interventions and orbits of one model, as tables."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loopscope.analysis.inside_options import (
    InterveneOptions,
    LensOptions,
    OrbitOptions,
    ProbeOptions,
)
from loopscope.analysis.measuring.streaming import measure
from loopscope.analysis.options import takes
from loopscope.analysis.tables import Tables
from loopscope.errors import InputError
from loopscope.models import Hooked
from loopscope.text import load_samples, one_text

Progress = Callable[[int], Any]


@takes(LensOptions)
def lens(
    model: Hooked,
    samples: Any = None,
    *,
    loops: int | None = None,
    batch_size: int = 16,
    name: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Read every state as if it were the last: logit lens, coda lens, tuned lens (docs/INSIDE.md).

    A lens shows what can be read of a state, not what the model goes on to use.

    Args:
        model: A native model, or a wrapped one.
        samples: A text, or samples as in `measure`; the shipped held-out ones when not given.
        loops: T, iterations to run beyond the model's own K, where it allows more.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: As `LensOptions` describes them.

    Returns:
        The tables `lens` (per state and sample) and `lens_tokens` (the first sample, token by
        token), for `ls.plot.lens` and `ls.plot.lens_tokens`.

    Raises:
        InputError: for samples or options that cannot be.
    """
    return measure(
        model, _samples(model, samples), ["lens"], more_loops=_more(model, loops), lens=options,
        batch_size=batch_size, name=name, progress=progress,
    )  # fmt: skip


@takes(ProbeOptions, but=("labels",))
def probe(
    model: Hooked,
    samples: Any = None,
    labels: Any = None,
    *,
    batch_size: int = 16,
    name: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Fit linear probes to states, with controls beside every score (docs/INSIDE.md).

    A probe shows what is in a state, not what the model uses: give the same labels to `intervene`
    to see whether the loss cares.

    Args:
        model: A native model, or a wrapped one.
        samples: Samples as in `measure`; the shipped held-out ones when not given.
        labels: Names of built-in labels, or name → one label per token (samples × pos) or per
            sample; a few built-in ones when not given.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: As `ProbeOptions` describes them.

    Returns:
        The table `probe`, for `ls.plot.probe`.

    Raises:
        InputError: for samples, labels or options that cannot be.
    """
    return measure(
        model, _samples(model, samples), ["probe"], probe={**options, "labels": labels},
        batch_size=batch_size, name=name, progress=progress,
    )  # fmt: skip


@takes(InterveneOptions, but=("what", "how"))
def intervene(
    model: Hooked,
    samples: Any = None,
    what: str | Sequence[str] | None = None,
    how: str | Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    name: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Change one thing inside a model and measure what it does to the prediction (docs/INSIDE.md).

    Args:
        model: A native model, or a wrapped one.
        samples: A text, or samples as in `measure`; the shipped held-out ones when not given.
        what: Kinds of places (`iteration`, `attention`, `mlp`, `slot`, `write`, `read`, `edge`,
            `head`), places by name (`loop1`, `loop1.attn`, `m2@1`, `read m2@1`, `h_m0>h2`), or
            several at once (`loop1+m2@1`); all kinds but heads when not given.
        how: `skip`, `zero`, `mean`, `resample`, `patch` (with `source`), `erase` (with `labels`),
            or several; each kind's own when not given.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: As `InterveneOptions` describes them.

    Returns:
        The table `effect`, for `ls.plot.effect` and `ls.plot.mass_effect`.

    Raises:
        InputError: for places, ways, samples or options that cannot be.
    """
    chosen = {"what": what, "how": how}
    options |= {key: value for key, value in chosen.items() if value is not None}
    return measure(
        model, _samples(model, samples), ["intervene"], intervene=options,
        batch_size=batch_size, name=name, progress=progress,
    )  # fmt: skip


@takes(OrbitOptions)
def orbit(
    model: Hooked,
    samples: Any = None,
    *,
    loops: int | None = None,
    batch_size: int = 16,
    name: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tables:
    """Follow the states: steps, angles, contraction, drift, paths, early exit (docs/INSIDE.md).

    Args:
        model: A native model, or a wrapped one.
        samples: A text, or samples as in `measure`; the shipped held-out ones when not given.
        loops: T, iterations to run; beyond the model's own K where it allows more.
        batch_size: Samples per forward pass.
        name: Name of the model in the tables; the model's own when not given.
        progress: Called with the number of samples done since the last call.
        **options: As `OrbitOptions` describes them.

    Returns:
        The tables `orbit`, `attention_drift`, `orbit_path` and `early_exit`, for the figures of
        these names.

    Raises:
        InputError: for samples or options that cannot be.
    """
    return measure(
        model, _samples(model, samples), ["orbit"], more_loops=_more(model, loops), orbit=options,
        batch_size=batch_size, name=name, progress=progress,
    )  # fmt: skip


def _samples(model: Any, samples: Any) -> Any:
    """Samples as `measure` takes them."""
    if isinstance(model, str | Path | list | tuple):
        raise InputError(
            f"give a model, not {type(model).__name__}: load(…) of a name or folder, and one model "
            "at a time; `compare` with measures=[…] takes several."
        )
    if samples is None:
        return load_samples(model)
    if isinstance(samples, str):
        return one_text(model, samples)
    if isinstance(samples, Tensor) and samples.ndim == 1:
        return samples[None]
    return samples


def _more(model: Hooked, loops: int | None) -> int | None:
    """Iterations beyond the model's own; as many as it has are none."""
    return None if loops is None or loops == model.K else loops


__all__ = ["intervene", "lens", "orbit", "probe"]
