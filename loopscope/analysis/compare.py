"""Compare: several models on the same text, one after the other, into one set of tables."""

from collections.abc import Callable, Mapping, Sequence
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
            told = [n for n in provenance["notes"] if "n_ctx" in n or n.startswith("loss")]
            found += [f"{name}: {note}" for note in told]
            if unused := provenance["training"].get("unused_weights"):
                more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
                found.append(f"{name}: weights not used: {', '.join(unused[:3])}{more}")
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


def labels(targets: Sequence[Any], names: Sequence[str]) -> list[str]:
    """A name for each target, all different.

    Args:
        targets: What can be loaded, or models.
        names: The name of each.

    Returns:
        The name, or the target as given where two names are the same.

    Raises:
        InputError: if the same target is given twice.
    """
    full = [str(t) if _is_named(t) else n for t, n in zip(targets, names, strict=True)]
    twice = sorted({f for f in full if full.count(f) > 1})
    if twice:
        raise InputError(
            f"{', '.join(twice)} is given twice; give each model once (two models in memory with "
            "one name: set model.name)."
        )
    return [f if list(names).count(n) > 1 else n for n, f in zip(names, full, strict=True)]


def _is_named(target: Any) -> bool:
    """Whether a target is still to be loaded."""
    return isinstance(target, str | Path)


def _look_up(
    targets: Sequence[Any], layout: str | None, trust_remote_code: bool
) -> tuple[list[str], list[bool | None], list[bool]]:
    """What is known of the targets before any weight is read.

    Returns:
        Their names, whether each has no loop (None where that shows only when it is loaded), and
        whether each is a foreign model that is still to be loaded.
    """
    names, plain, foreign = [], [], []
    for target in targets:
        if _is_named(target):
            name, config = peek(target, trust_remote_code=trust_remote_code)
        else:
            name, config = str(target.name), target.config
        names.append(name)
        foreign.append(config is None)
        plain.append(None if config is None else _is_plain(target, config))
    names = labels(targets, names)
    if layout is not None:
        Layout.parse(layout)
        if not any(one is None or one for one in plain):
            raise InputError(_nothing_to_regroup(layout, names))
    return names, plain, foreign


def _is_plain(model: Any, config: Any) -> bool:
    """Whether a layout can group the layers of a model: it has no loop."""
    found = getattr(model, "map", None)
    return config.variant == "vanilla" if found is None else found.main is None


def _nothing_to_regroup(layout: str, names: Sequence[str]) -> str:
    return (
        f"layout {layout} regroups vanilla models, and none of {', '.join(names)} is one; "
        "leave the layout out."
    )


def compare(
    targets: Sequence[Any],
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
    loops: int | Mapping[str, int] | None = None,
    spec: str | Path | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
    **options: Any,
) -> Comparison:
    """Load and measure models on the same text, one model in memory at a time.

    Args:
        targets: Whatever `load` takes, or models in memory.
        data: Text or tokens to measure on; the shipped held-out samples when not given.
        samples: Windows to measure.
        tokens: Tokens per window.
        seed: Chooses the windows, and the weights of untrained twins.
        layout: Groups the layers of the models without a loop into virtual blocks; models with a
            loop keep theirs.
        device: Where loaded models go; the CPU when not given.
        dtype: Floating type of loaded models; float32 when not given.
        batch_size: Windows per forward pass.
        measures: As in `measure`.
        progress: Called with (model, samples done since the last call, samples in all).
        loops: Iterations to run, as in `load`; native models without a loop stay as they are.
        spec: How the foreign models among the targets loop, as in `load`.
        trust_remote_code: Whether Python code that came with a checkpoint may run.
        device_map: Spreads the foreign models among the targets over devices, as in `load`.
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
    names, plain, foreign = _look_up(targets, layout, trust_remote_code)
    if (device or dtype) and not all(_is_named(target) for target in targets):
        raise InputError(
            "device and dtype apply to models that are loaded here, and one is given in memory; "
            "convert it with model.to(...) and leave both out."
        )
    apart = {"spec": spec, "device_map": device_map}
    unused = [name for name, value in apart.items() if value is not None and not any(foreign)]
    if unused:
        raise InputError(
            f"{' and '.join(unused)} apply to foreign models that are loaded here, and none of "
            f"{', '.join(names)} is one; leave {'them' if unused[1:] else 'it'} out."
        )
    parts, used, regrouped = [], {}, False
    for i, (target, name) in enumerate(zip(targets, names, strict=True)):
        if _is_named(target):
            model = load(
                target, device=device, dtype=dtype, seed=seed, name=name,
                trust_remote_code=trust_remote_code, **(apart if foreign[i] else {}),
                loops=None if plain[i] else loops,
            )  # fmt: skip
        else:
            model = target
            if loops is not None and not plain[i]:
                model = model.with_loops(loops)
        if layout is not None:
            if again := _is_plain(model, model.config):
                model = model.with_layout(layout)
            regrouped = regrouped or again
            if not regrouped and not any(one is None or one for one in plain[i + 1 :]):
                raise InputError(_nothing_to_regroup(layout, names))
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
