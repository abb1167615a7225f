"""Compare: several models on the same text, one after the other, into one set of tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loopscope.analysis.collapse import SIGNS, signs
from loopscope.analysis.measure import MEASURES, measure
from loopscope.analysis.tables import Tables
from loopscope.data import Samples, load_samples
from loopscope.errors import InputError
from loopscope.models.layout import Layout
from loopscope.models.load import check_seed, load, peek
from loopscope.models.model import LoopModel


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models measured on the same text.

    Attributes:
        tables: The tables of all models.
        samples: The samples of each model, by its name in the tables.
    """

    tables: Tables
    samples: dict[str, Samples]

    @property
    def notes(self) -> list[str]:
        """What a reader should know beside the numbers: fewer windows than asked for, and such."""
        found = []
        for name, samples in self.samples.items():
            wanted = samples.provenance.get("requested", len(samples))
            if len(samples) < wanted:
                found.append(f"{name}: the text gave {len(samples)} windows of {wanted} asked for")
            provenance = self.tables.provenance["models"][name]
            found += [f"{name}: {note}" for note in provenance["notes"] if "n_ctx" in note]
        for table, frame in self.tables.frames().items():
            broken = frame[frame["flag"].eq("nonfinite")]
            for model, rows in broken.groupby("model", observed=True):
                count = rows["sample"].nunique()
                found.append(f"{model}: NaN or infinite values in {count} samples of table {table}")
        if len({samples.sha256 for samples in self.samples.values()}) > 1:
            found.append(
                "the models have different tokenizers, so their windows differ; losses per token "
                "cannot be compared between them"
            )
        return found

    @property
    def signs(self) -> pd.DataFrame:
        """Loss and signs of collapse, mean and deviation over samples (see `collapse.SIGNS`)."""
        return signs(self.tables)

    def __repr__(self) -> str:
        counts = {len(samples) for samples in self.samples.values()}
        return f"Comparison of {', '.join(self.samples)} on {'/'.join(map(str, counts))} samples"

    def _repr_html_(self) -> str:
        table = self.signs
        spread = (" ± " + table["std"].map("{:.3f}".format)).where(table["n"] > 1, "")
        cell = table["mean"].map("{:.3f}".format) + spread
        titles = {sign.name: sign.title for sign in SIGNS}
        shown = table.assign(cell=cell.where(table["n"] > 0, "–"))
        wide = shown.pivot(index="sign", columns="model", values="cell").rename(index=titles)
        return wide.rename_axis(index=None, columns=None).to_html()


def labels(targets: Sequence[str | Path | LoopModel], names: Sequence[str]) -> list[str]:
    """A name for each target, all different.

    Args:
        targets: Zoo names, folders or models.
        names: The name of each.

    Returns:
        The name, or the path as given where two names are the same.

    Raises:
        InputError: if the same target is given twice.
    """
    full = [n if isinstance(t, LoopModel) else str(t) for t, n in zip(targets, names, strict=True)]
    twice = sorted({f for f in full if full.count(f) > 1})
    if twice:
        raise InputError(
            f"{', '.join(twice)} is given twice; give each model once (two models in memory with "
            "one name: set model.name)."
        )
    return [f if list(names).count(n) > 1 else n for n, f in zip(names, full, strict=True)]


def _look_up(
    targets: Sequence[str | Path | LoopModel], layout: str | None
) -> tuple[list[str], list[bool]]:
    """Names of the targets, and which of them the layout regroups; nothing is computed."""
    found = [(str(t.name), t.config) if isinstance(t, LoopModel) else peek(t) for t in targets]
    names = labels(targets, [name for name, _ in found])
    if layout is None:
        return names, [False] * len(names)
    Layout.parse(layout)
    regroup = [config.variant == "vanilla" for _, config in found]
    if not any(regroup):
        raise InputError(
            f"layout {layout} regroups vanilla models, and none of {', '.join(names)} is one; "
            "leave the layout out."
        )
    return names, regroup


def compare(
    targets: Sequence[str | Path | LoopModel],
    *,
    data: str | Path | None = None,
    samples: int = 500,
    tokens: int = 256,
    seed: int = 0,
    layout: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    measures: Sequence[str] = MEASURES,
    progress: Callable[[str, int, int], Any] | None = None,
    **options: Any,
) -> Comparison:
    """Load and measure models on the same text, one model in memory at a time.

    Args:
        targets: Zoo names, checkpoint folders, `@init` twins, or models.
        data: Text or tokens to measure on; the shipped held-out samples when not given.
        samples: Windows to measure.
        tokens: Tokens per window.
        seed: Chooses the windows, and the weights of untrained twins.
        layout: Groups the layers of the vanilla models among the targets into virtual blocks;
            models with a loop keep theirs.
        device: Where loaded models go; the CPU when not given.
        dtype: Floating type of loaded models; float32 when not given.
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
    check_seed(seed)
    names, regroup = _look_up(targets, layout)
    if (device or dtype) and any(isinstance(target, LoopModel) for target in targets):
        raise InputError(
            "device and dtype apply to models that are loaded here, and one is given in memory; "
            "convert it with model.to(...) and leave both out."
        )
    parts, used = [], {}
    for target, name, again in zip(targets, names, regroup, strict=True):
        if isinstance(target, LoopModel):
            model = target
        else:
            model = load(target, device=device, dtype=dtype or "float32", seed=seed, name=name)
        if layout is not None and again:
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
    return Comparison(tables=Tables.concat(parts), samples=used)
