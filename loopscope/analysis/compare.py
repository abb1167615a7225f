"""Compare: several models on the same text, one after the other, into one set of tables."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

from loopscope.analysis.comparing import (
    Comparing,
    Result,
    Settings,
    Watch,
    nothing_to_regroup,
)
from loopscope.analysis.comparison import Comparison, save_with_report
from loopscope.analysis.measure import MEASURES
from loopscope.analysis.merging import Merged, joined, merged
from loopscope.analysis.record import Options
from loopscope.analysis.shards import Store
from loopscope.analysis.tables import Tables
from loopscope.analysis.targets import Checkpoint, Plan, look_up, with_twins
from loopscope.corpus import SUFFIXES, check_file
from loopscope.errors import InputError, unknown_name
from loopscope.models.layout import Layout
from loopscope.models.load import check_seed, parse_dtype
from loopscope.output import claimed
from loopscope.processes import Processes, launched

PATIENCE = timedelta(days=7)
"""How long a process waits for the others to finish their shards."""


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
    progress: Callable[[str, int, int], Any] | Watch | None = None,
    loops: int | Mapping[str, int] | None = None,
    spec: str | Path | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
    out: str | Path | None = None,
    twins: bool = True,
    more_loops: int | None = None,
    series: bool = True,
    write: Callable[[Comparison, Path], Any] | None = None,
    **options: Any,
) -> Comparison:
    """Load and measure models on the same text, one model in memory at a time.

    With `out` every finished part is stored there at once (in `.shards`, until all is done): the
    same call goes on where an earlier one was stopped, however that was. Under `accelerate launch`
    the processes share the work; process 0 has the result, the others an empty one.

    Args:
        targets: Whatever `load` takes, or models in memory. A pattern (`run/step-*`), a folder of
            step checkpoints, or two or more of them side by side are a series: one model, with its
            steps in the column `step`.
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
        out: Folder of the results: `tables/`, `provenance.json`, `summary.json`, `report.html`, and
            what is unfinished.
        twins: Measure the untrained twin of each configuration too, as `<model>@init`.
        more_loops: Iterations to run besides a model's own, for `delta` and `readout` where the
            model allows it; twice its own when not given, 0 for none.
        series: Whether steps are one model; otherwise each is a model of its own.
        write: Called with the comparison and `out` instead of writing all that.
        **options: Options of `measure`.

    Returns:
        The tables, models in the order given, and each model's samples. A target that cannot be
        measured after all is in `failed`.

    Raises:
        InputError: for whatever cannot be found or read before the first model is measured; where
            nothing could be measured; where results cannot be stored, or another command is
            writing to `out`.
    """
    if isinstance(targets, str | Path):
        targets = [targets]
    known = [
        field.name for field in fields(Options) if field.name not in ("measures", "more_loops")
    ]
    for name in options:
        if name not in known:
            raise unknown_name("option of compare", name, [*signature(compare).parameters, *known])
    names = (measures,) if isinstance(measures, str) else tuple(dict.fromkeys(measures))
    check_seed(seed)
    Options(measures=names, **options)
    for name in names:
        if name not in MEASURES:
            raise unknown_name("measure", name, MEASURES)
    if dtype is not None:
        parse_dtype(dtype)
    for name, value, least in (("samples", samples, 1), ("tokens", tokens, 4)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, given {value}.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    if more_loops is not None and more_loops < 0:
        raise InputError(f"more_loops must be 0 or more, given {more_loops}.")
    if data is not None:
        check_file(Path(data), (*SUFFIXES, ".npy"))
    folder = None if out is None else Path(out).expanduser()
    if launched() > 1 and (folder is None or device_map is not None):
        raise InputError(
            "several processes need an output folder that all of them see; give out (--out)."
            if folder is None
            else "device_map spreads one model over all devices, so it takes one process; leave "
            "it out, or run without accelerate launch."
        )
    processes = Processes.join(device, patience=PATIENCE)
    settings = Settings(
        data=data, samples=int(samples), tokens=int(tokens), seed=seed, layout=layout,
        device=device if processes.count == 1 or device is None else str(processes.device),
        dtype=dtype, batch_size=int(batch_size), measures=names, loops=loops, spec=spec,
        trust_remote_code=trust_remote_code, device_map=device_map,
        more_loops=None if more_loops is None else int(more_loops), options=options,
    )  # fmt: skip
    store = Store(folder)
    watch = progress if isinstance(progress, Watch) else _Told(progress)
    with claimed(folder) if folder is not None and processes.main else nullcontext():
        plan = look_up(targets, trust_remote_code=trust_remote_code, series=series)
        _check(plan, settings)
        if twins:
            plan = with_twins(plan, seed=seed)
        _meet(processes, store)
        own = Comparing(plan, settings, store, processes, watch).run()
        results = joined(processes.gather([_sent(one) for one in own])) if folder else own
        if not processes.main:
            return Comparison(tables=Tables(), samples={})
        found = _comparison(plan, merged(plan, results, store, settings.batch_size), own)
        if folder is not None:
            _finish(found, folder, store, [one.key for one in results if one.key], write)
    return found


class _Told(Watch):
    """A plain callback."""

    def __init__(self, progress: Callable[[str, int, int], Any] | None) -> None:
        self.progress = progress

    def measured(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        if self.progress is not None:
            self.progress(checkpoint.model, samples, total)

    resumed = measured


def _check(plan: Plan, settings: Settings) -> None:
    """Refuse options that apply to none of the models."""
    there = plan.checkpoints
    if settings.layout is not None:
        Layout.parse(settings.layout)
        if all(one.plain is False for one in there):
            raise InputError(nothing_to_regroup(settings.layout, plan.models))
    if (settings.device or settings.dtype) and not all(one.named for one in there):
        raise InputError(
            "device and dtype apply to models that are loaded here, and one is given in memory; "
            "convert it with model.to(...) and leave both out."
        )
    apart = {"spec": settings.spec, "device_map": settings.device_map}
    unused = [name for name, value in apart.items() if value is not None]
    if unused and not any(one.foreign for one in there):
        raise InputError(
            f"{' and '.join(unused)} apply to foreign models that are loaded here, and none of "
            f"{', '.join(plan.models)} is one; leave {'them' if unused[1:] else 'it'} out."
        )


def _meet(processes: Processes, store: Store) -> None:
    """Whether all processes see one folder, before any of them measures."""
    if processes.count == 1 or store.folder is None:
        return
    if processes.main:
        store.write("launch", b"here")
    processes.wait()
    if not all(processes.gather(store.read("launch") is not None)):
        raise InputError(
            f"not all processes see {store.folder}; --out must be a folder that they share."
        )


def _sent(result: Result) -> Result:
    """What other processes need to know; exceptions cannot always be sent."""
    return replace(result, error=None)


def _comparison(plan: Plan, found: Merged, own: Sequence[Result]) -> Comparison:
    """The result, with all that was left out.

    Raises:
        InputError: if nothing but twins was measured.
    """
    named = [(one, reason) for one, reason in found.failed if not one.twin_of]
    there = [one for one in plan.checkpoints if not one.twin_of]
    if len(named) == len(there) or found.tables is None:
        cause = next((one.error for one in own if one.error is not None), None)
        reasons = {reason: one for one, reason in reversed(named)}
        if len(reasons) == 1:
            raise InputError(named[0][1]) from cause
        told = "; ".join(f"{one.label}: {why}" for why, one in reversed(reasons.items()))
        raise InputError(f"none of the checkpoints can be measured: {told}") from cause
    remarks = list(plan.notes)
    for one, reason in found.failed:
        if one.twin_of:
            remarks.append(f"{', '.join(one.twin_of)}: no untrained twin: {reason}")
    failed = [*plan.failed]
    for one, reason in named:
        failed.append((str(one.target) if one.named else one.label, reason))
    twins = {model: twin for model, twin in plan.twins.items() if twin in found.samples}
    twins = {model: twin for model, twin in twins.items() if model in found.samples}
    found.tables.provenance["comparison"] = {
        "twins": twins,
        "missing": plan.missing,
        "failed": [list(one) for one in failed],
    }
    return Comparison(
        tables=found.tables,
        samples=found.samples,
        failed=failed,
        missing=plan.missing,
        twins=twins,
        incomplete=any(one.step is None for one, _ in named),
        remarks=remarks,
    )


def _finish(
    found: Comparison,
    folder: Path,
    store: Store,
    keys: Sequence[str],
    write: Callable[[Comparison, Path], Any] | None,
) -> None:
    """Write the results, then remove the shards that they are made of."""
    if others := store.size(besides=keys):
        found.remarks.append(
            f"{store.folder} holds {others / 1e6:.1f} MB of another command that was not finished; "
            "give that one again, or remove the folder"
        )
    if found.incomplete:
        found.remarks.append(
            f"{store.folder} keeps what was measured: once the rest can be read, the same command "
            "measures only that"
        )
    try:
        (write or save_with_report)(found, folder)
    except (InputError, OSError) as error:
        reason = str(error) if isinstance(error, InputError) else f"{error.strerror or error}."
        raise InputError(
            f"{reason} What was measured is kept in {store.folder}; the same command goes on."
        ) from error
    if not found.incomplete:
        store.remove(keys)


__all__ = ["Comparison", "Watch", "compare"]
