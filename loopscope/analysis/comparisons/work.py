"""Compare: several models on the same text, one after the other, into one set of tables."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

from loopscope.analysis.comparisons.plan import Checkpoint, Plan, look_up, with_twins
from loopscope.analysis.comparisons.result import Comparison, save_with_report
from loopscope.analysis.comparisons.stamps import (
    stamp_of_data,
    stamp_of_model,
    stamp_of_spec,
    stamp_of_target,
)
from loopscope.analysis.comparisons.store import Shelf, Store, StoreError, cuts, key_of
from loopscope.analysis.measuring.course import iterations
from loopscope.analysis.measuring.recorder import Options
from loopscope.analysis.measuring.streaming import MEASURES, Measuring
from loopscope.analysis.tables.frames import SCHEMAS, Tables
from loopscope.devices import check_seed, parse_dtype
from loopscope.errors import InputError, unknown_name
from loopscope.files import claimed
from loopscope.models.native.layout import Layout
from loopscope.models.opening.loading import load
from loopscope.processes import Processes, launched
from loopscope.provenance import commit, versions
from loopscope.text.corpus import SUFFIXES, check_file
from loopscope.text.windows import Samples, load_samples


class Watch:
    """Is told how a comparison goes; what is not overridden is not listened to."""

    def planned(self, samples: int, done: int) -> None:
        """Before the first model: samples of this process, and how many of them are done."""

    def measured(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        """Samples done since the last call, of all samples of a checkpoint."""

    def resumed(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        """Samples that an earlier run did."""

    def late(self, samples: int) -> None:
        """Samples that an earlier run did and `planned` could not count."""

    def dropped(self, samples: int) -> None:
        """Samples that were planned and are not there, or cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and how, apart from the targets; fields as in `compare`."""

    data: str | Path | None
    samples: int
    tokens: int
    seed: int
    layout: str | None
    device: str | None
    dtype: str | None
    batch_size: int
    measures: tuple[str, ...]
    loops: int | Mapping[str, int] | None
    spec: Any
    trust_remote_code: bool
    device_map: Any
    more_loops: int | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Everything that decides a result but the checkpoint, as JSON values."""
        return {
            "data": stamp_of_data(self.data),
            "samples": [self.samples, self.tokens, self.seed, self.batch_size],
            "model": [self.layout, self.loops, self.dtype, stamp_of_spec(self.spec)],
            "device": [(self.device or "cpu").partition(":")[0], self.device_map],
            "measures": [*self.measures, self.more_loops],
            "options": dict(self.options),
            "versions": [versions(), commit(), SCHEMAS],
        }


@dataclass(kw_only=True)
class Result:
    """What became of one checkpoint.

    Attributes:
        key: Where its shards are; empty if it could not even be looked at.
        stamp: What its weights were told by.
        failed: Why it could not be measured; empty if it could.
        error: What was raised then, in this process.
    """

    key: str = ""
    stamp: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    error: BaseException | None = None


class Comparing:
    """The run of one process."""

    def __init__(
        self, plan: Plan, settings: Settings, store: Store, processes: Processes, watch: Watch
    ) -> None:
        """Look at what is there already.

        Args:
            plan: The checkpoints.
            settings: What to measure.
            store: Where shards go, and are.
            processes: This process among others.
            watch: Is told how it goes.
        """
        self.plan, self.settings, self.store = plan, settings, store
        self.processes, self.watch = processes, watch
        self.results = [Result() for _ in plan.checkpoints]
        self._told = settings.told() if store.folder is not None else {}
        self._left = [0] * len(plan.checkpoints)
        self._looped: set[int] = set()

    def run(self) -> list[Result]:
        """Measure this process's shards.

        Returns:
            What became of each checkpoint, in the plan's order.

        Raises:
            StoreError: if nothing more can be stored.
            InputError: if a layout was given and turns out to apply to no model.
        """
        self._survey()
        for number, result in enumerate(self.results):
            if result.failed or not self._wanted(number) or self._orphaned(number):
                continue
            try:
                self._measure(number, result)
            except (StoreError, _NothingToRegroup):
                raise
            except Exception as error:  # one checkpoint that fails, however, spoils no other
                result.failed, result.error = _reason(error), error
                self.watch.dropped(self._left[number])
            gc.collect()  # models may refer to themselves; two would not fit into memory
        return self.results

    # -- before the first model is loaded --------------------------------------------------------

    def _survey(self) -> None:
        """Find the keys of what need not be loaded for that, and count what is done."""
        total = done = 0
        for number, checkpoint in enumerate(self.plan.checkpoints):
            result = self.results[number]
            try:
                self._identify(checkpoint, result, None)
            except (InputError, OSError) as error:
                result.failed, result.error = _reason(error), error
                continue
            shards, here = self._wanted(number), 0
            if result.key and (samples := Shelf(self.store, result.key).samples()) is not None:
                shelf, shards = Shelf(self.store, result.key), self._shards(number, samples)
                here = _count(shard for shard in shards if shelf.has(*shard))
            self._left[number] = _count(shards) - here
            total, done = total + _count(shards), done + here
        self.watch.planned(total, done)

    def _orphaned(self, number: int) -> bool:
        """Whether a checkpoint is the twin of models that all failed."""
        of = self.plan.checkpoints[number].twin_of
        pairs = zip(self.plan.checkpoints, self.results, strict=True)
        return bool(of) and not any(one.model in of and not result.failed for one, result in pairs)

    def _wanted(self, number: int) -> list[tuple[int, int]]:
        """This process's shards of a checkpoint, if the text gives all windows asked for."""
        return self._share(number, self.settings.samples, self.settings.tokens)

    def _shards(self, number: int, samples: Samples) -> list[tuple[int, int]]:
        return self._share(number, len(samples), samples.tokens.shape[1])

    def _share(self, number: int, samples: int, tokens: int) -> list[tuple[int, int]]:
        """This process's shards of a checkpoint: every n-th, the first not always process 0's."""
        shards = cuts(samples, tokens, self.settings.batch_size)
        rank, count = self.processes.rank, self.processes.count
        return [one for i, one in enumerate(shards) if (number + i) % count == rank]

    def _identify(self, checkpoint: Checkpoint, result: Result, model: Any) -> None:
        """Where the shards of a checkpoint are, if that can be told yet."""
        if result.key or (self.store.folder is None and model is None):
            return
        if self.store.folder is None:
            result.key = key_of({"model": checkpoint.model, "step": checkpoint.step})
            return
        stamp: dict[str, Any] | None
        if checkpoint.named and model is None:
            trusted = self.settings.trust_remote_code
            stamp = stamp_of_target(checkpoint.target, trust_remote_code=trusted)
        else:
            stamp = stamp_of_model(checkpoint.target if model is None else model)
        if stamp is None:
            return
        result.stamp = stamp
        name = [checkpoint.model, checkpoint.step]
        result.key = key_of({"name": name, "stamp": stamp, "settings": self._told})

    # -- one checkpoint --------------------------------------------------------------------------

    def _measure(self, number: int, result: Result) -> None:
        """Measure what is missing of a checkpoint."""
        checkpoint, model = self.plan.checkpoints[number], None
        late = not result.key
        if late:
            model = self._load(number)
            self._identify(checkpoint, result, model)
        shelf = Shelf(self.store, result.key)
        samples = shelf.samples()
        shards = [] if samples is None else self._shards(number, samples)
        if samples is None or not all(shelf.has(*shard) for shard in shards):
            model = model or self._load(number)
            fresh = self._samples(model)
            if samples is None or samples.sha256 != fresh.sha256:
                samples, shards = fresh, self._shards(number, fresh)
                shelf.begin(samples)
                self.watch.dropped(_count(self._wanted(number)) - _count(shards))
        measuring = None
        for start, stop in shards:
            if shelf.has(start, stop):
                if late:
                    self.watch.late(stop - start)
                self.watch.resumed(checkpoint, stop - start, len(samples))
                continue
            measuring = measuring or self._measuring(model, checkpoint, samples)

            def told(n: int, total: int = len(samples)) -> None:
                self._left[number] -= n
                self.watch.measured(checkpoint, n, total)

            shelf.put(start, stop, measuring.part(start, stop, told))

    def _samples(self, model: Any) -> Samples:
        settings = self.settings
        return load_samples(
            model, settings.data, samples=settings.samples, tokens=settings.tokens,
            seed=settings.seed,
        )  # fmt: skip

    def _measuring(self, model: Any, checkpoint: Checkpoint, samples: Samples) -> Measuring:
        settings, more, note = self.settings, None, ""
        if {"delta", "readout"} & {*settings.measures}:
            more, note = _more_loops(model, settings.more_loops)
        measuring = Measuring(
            model, samples, settings.measures, batch_size=settings.batch_size,
            name=checkpoint.model, step=checkpoint.step, more_loops=more, **settings.options,
        )  # fmt: skip
        if note:
            measuring.provenance["notes"].append(note)
        return measuring

    def _load(self, number: int) -> Any:
        """The model of a checkpoint, with the iterations and layout asked for."""
        settings, checkpoint = self.settings, self.plan.checkpoints[number]
        loops = None if checkpoint.plain else settings.loops
        if checkpoint.named:
            foreign = {"spec": settings.spec, "device_map": settings.device_map}
            model = load(
                checkpoint.target, device=settings.device, dtype=settings.dtype,
                seed=settings.seed, name=checkpoint.model, loops=loops,
                trust_remote_code=settings.trust_remote_code,
                **(foreign if checkpoint.foreign else {}),
            )  # fmt: skip
        else:
            model = checkpoint.target if loops is None else checkpoint.target.with_loops(loops)
        if settings.layout is None:
            return model
        if is_plain(model):
            return model.with_layout(settings.layout)
        self._looped.add(number)
        plan = self.plan.checkpoints
        if all(
            one.plain is False or one.twin_of or i in self._looped for i, one in enumerate(plan)
        ):
            raise _NothingToRegroup(nothing_to_regroup(settings.layout, self.plan.models))
        return model


class _NothingToRegroup(InputError):
    """A layout was given, and no model is without a loop."""


def is_plain(model: Any) -> bool:
    """Whether a layout can group the layers of a model: it has no loop."""
    found = getattr(model, "map", None)
    return model.config.variant == "vanilla" if found is None else found.main is None


def nothing_to_regroup(layout: str, names: Sequence[str]) -> str:
    """What to say where a layout applies to no model."""
    return (
        f"layout {layout} regroups vanilla models, and none of {', '.join(names)} is one; "
        "leave the layout out."
    )


def _count(shards: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in shards)


def _more_loops(model: Any, wanted: int | None) -> tuple[int | None, str]:
    """Iterations to run besides a model's own, and what to note."""
    K = iterations(model)
    if wanted == 0 or K == 0:
        return None, ""
    if wanted is not None and wanted <= K:
        return None, f"more loops: {wanted} are not more than its own {K}"
    return 2 * K if wanted is None else wanted, ""


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(kw_only=True)
class Merged:
    """What was measured, and what could not be.

    Attributes:
        tables: The tables; None where nothing was measured.
        samples: The samples of each model.
        failed: Checkpoints that could not be measured, with the reason.
    """

    tables: Tables | None = None
    samples: dict[str, Samples] = field(default_factory=dict)
    failed: list[tuple[Checkpoint, str]] = field(default_factory=list)


def joined(of_processes: Sequence[Sequence[Result]]) -> list[Result]:
    """What became of each checkpoint, from what each process saw."""
    found = []
    for seen in zip(*of_processes, strict=True):
        keyed = next((one for one in seen if one.key), seen[0])
        failed = next((one for one in seen if one.failed), keyed)
        found.append(
            Result(key=keyed.key, stamp=keyed.stamp, failed=failed.failed, error=failed.error)
        )
    return found


def merged(plan: Plan, results: Sequence[Result], store: Store, batch_size: int) -> Merged:
    """The tables of all checkpoints from their shards.

    Args:
        plan: The checkpoints.
        results: What became of each, over all processes.
        store: Where the shards are.
        batch_size: As they were measured with.

    Returns:
        Tables in the plan's order. The provenance of a model has its target and stamp besides, of
        a series those of every step.

    Raises:
        InputError: if a shard cannot be seen from here.
    """
    out, parts = Merged(), []
    same: dict[str, Samples] = {}
    origins: dict[str, dict[str, Any]] = {}
    for checkpoint, result in zip(plan.checkpoints, results, strict=True):
        if checkpoint.twin_of and not out.samples.keys() & {*checkpoint.twin_of}:
            continue  # nobody asked for it, and what it is the twin of was not measured
        if result.failed:
            out.failed.append((checkpoint, result.failed))
            continue
        shelf = Shelf(store, result.key)
        samples = shelf.samples()
        if samples is None:
            raise _unseen(checkpoint, store)
        samples = same.setdefault(samples.sha256, samples)
        first = out.samples.setdefault(checkpoint.model, samples)
        if first.sha256 != samples.sha256:
            reason = "its tokenizer is not that of the run's first step, so its samples differ"
            out.failed.append((checkpoint, reason))
            continue
        shards = [
            shelf.get(*shard) for shard in cuts(len(samples), samples.tokens.shape[1], batch_size)
        ]
        there = [one for one in shards if one is not None]
        if len(there) < len(shards):
            raise _unseen(checkpoint, store)
        parts += there
        origin = origins.setdefault(
            checkpoint.model, there[0].provenance["models"][checkpoint.model]
        )
        told: dict[str, Any] = {"target": str(checkpoint.target) if checkpoint.named else None}
        if result.stamp:
            told["stamp"] = result.stamp
        if "target" not in origin:
            origin |= told
        if checkpoint.twin_of:
            origin["twin_of"] = list(checkpoint.twin_of)
        if checkpoint.step is not None:
            origin.setdefault("steps", {})[str(checkpoint.step)] = told
    out.tables = Tables.join(parts) if parts else None
    return out


def _unseen(checkpoint: Checkpoint, store: Store) -> InputError:
    where = store.folder or "memory"
    return InputError(
        f"shards of {checkpoint.label} cannot be seen in {where}: --out must be a folder that all "
        "processes share, and nothing else may write to it. Give the same command again."
    )


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


__all__ = [
    "Comparing",
    "Comparison",
    "Merged",
    "Result",
    "Settings",
    "Watch",
    "compare",
    "is_plain",
    "joined",
    "merged",
    "nothing_to_regroup",
]
