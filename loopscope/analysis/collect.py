"""Collect: several models, one after the other, into one set of tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope.analysis.measure import MEASURES, measure
from loopscope.analysis.tables import Tables
from loopscope.data import Samples, load_samples
from loopscope.errors import InputError
from loopscope.models.load import load, peek
from loopscope.models.model import LoopModel


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was measured, and what had to be left out.

    Attributes:
        tables: The tables of all models.
        samples: The samples of each model, by its name in the tables.
    """

    tables: Tables
    samples: dict[str, Samples]


def labels(targets: Sequence[str | Path | LoopModel]) -> list[str]:
    """A short name for each target, all different.

    Args:
        targets: Zoo names, folders or models.

    Returns:
        The model's name, or the path as given where two names are the same.

    Raises:
        InputError: if the same target is given twice, or one cannot be found.
    """
    names = [t.name or t.config.variant if isinstance(t, LoopModel) else peek(t) for t in targets]
    full = [n if isinstance(t, LoopModel) else str(t) for t, n in zip(targets, names, strict=True)]
    twice = sorted({f for f in full if full.count(f) > 1})
    if twice:
        raise InputError(f"{', '.join(twice)} is given twice; name each model once.")
    return [f if names.count(n) > 1 else n for n, f in zip(names, full, strict=True)]


def collect(
    targets: Sequence[str | Path | LoopModel],
    *,
    data: str | Path | None = None,
    samples: int = 500,
    tokens: int = 256,
    seed: int = 0,
    layout: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    measures: Sequence[str] = MEASURES,
    progress: Callable[[str, int, int], Any] | None = None,
    **options: Any,
) -> Collected:
    """Load and measure models on the same text, one model in memory at a time.

    Args:
        targets: Zoo names, checkpoint folders, `@init` twins, or models.
        data: Text or tokens to measure on; the shipped held-out samples when not given.
        samples: Windows to measure.
        tokens: Tokens per window.
        seed: Chooses the windows, and the weights of untrained twins.
        layout: Groups the layers of the vanilla models among the targets into virtual blocks;
            models with a loop keep theirs.
        device: Where to compute.
        dtype: Floating type of the weights.
        batch_size: Windows per forward pass.
        measures: As in `measure`.
        progress: Called with (model, samples done since the last call, samples in all).
        **options: Options of `measure`.

    Returns:
        The tables, models in the order given, and each model's samples.

    Raises:
        InputError: for whatever cannot be found, read or measured; all targets are looked up
            before the first is measured.
    """
    if not targets:
        raise InputError("no models given; name at least one.")
    names = labels(targets)
    parts, used = [], {}
    for target, name in zip(targets, names, strict=True):
        if isinstance(target, LoopModel):
            model = target
        else:
            model = load(target, device=device, dtype=dtype, seed=seed, name=name)
        if layout is not None and model.config.variant == "vanilla":
            model = model.with_layout(layout)
        chosen = load_samples(model, data, samples=samples, tokens=tokens, seed=seed)
        total = len(chosen.tokens)

        def told(n: int, name: str = name, total: int = total) -> None:
            if progress is not None:
                progress(name, n, total)

        part = measure(
            model, chosen, measures, batch_size=batch_size, name=name, progress=told, **options
        )
        parts.append(part)
        used[name] = chosen
        del model
    if layout is not None and not any(
        (part.provenance["models"][n]["config"] or {}).get("variant") == "vanilla"
        for part, n in zip(parts, names, strict=True)
    ):
        raise InputError(
            f"layout {layout} regroups vanilla models, and none of {', '.join(names)} is one; "
            "leave the layout out."
        )
    return Collected(tables=Tables.concat(parts), samples=used)
