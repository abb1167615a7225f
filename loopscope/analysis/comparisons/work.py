"""Compare: several models on the same text, one after the other, into one set of tables."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from loopscope.analysis.comparisons.plan import Checkpoint, Plan, look_up, with_twins
from loopscope.analysis.comparisons.result import (
    Comparison,
    Outcome,
    comparison_of,
    joined,
    merged,
    save_with_report,
)
from loopscope.analysis.comparisons.stamps import (
    stamp_of_data,
    stamp_of_example,
    stamp_of_function,
    stamp_of_model,
    stamp_of_spec,
    stamp_of_target,
)
from loopscope.analysis.comparisons.store import (
    Shelf,
    Store,
    StoreError,
    cuts,
    key_of,
    sample_length,
)
from loopscope.analysis.measuring import Items, Measuring, are_items, read_items
from loopscope.analysis.options import Settings, build_options, takes
from loopscope.analysis.tables import BY_NAME, SCHEMAS, Tables
from loopscope.devices import check_seed, parse_dtype
from loopscope.errors import InputError
from loopscope.files import claimed
from loopscope.models import Hooked
from loopscope.models.native import Layout
from loopscope.models.opening import load
from loopscope.processes import Processes, launched
from loopscope.provenance import commit, versions
from loopscope.text import SUFFIXES, Samples, check_file, load_samples, one_text

FOREIGN = ("spec", "example", "device_map")
"""Settings that only foreign models take, when they are loaded."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the others to finish their shards."""


class Watch:
    """Is told how a comparison goes; what is not overridden is not listened to."""

    def planned(self, samples: int, done: int) -> None:
        """Before the first model.

        Args:
            samples: Samples of this process.
            done: How many of them an earlier run did.
        """

    def measured(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        """After a batch.

        Args:
            checkpoint: Of which checkpoint.
            samples: Samples done since the last call.
            total: All samples of the checkpoint.
        """

    def resumed(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        """Instead of `measured`, for samples that an earlier run did.

        Args:
            checkpoint: Of which checkpoint.
            samples: How many.
            total: All samples of the checkpoint.
        """

    def late(self, samples: int) -> None:
        """Samples that an earlier run did and `planned` could not count.

        Args:
            samples: How many.
        """

    def dropped(self, samples: int) -> None:
        """Samples that were planned and do not exist, or cannot be measured.

        Args:
            samples: How many.
        """


class _Callback(Watch):
    """A plain callback."""

    def __init__(self, progress: Callable[[str, int, int], Any] | None) -> None:
        self.progress = progress

    def measured(self, checkpoint: Checkpoint, samples: int, total: int) -> None:
        if self.progress is not None:
            self.progress(checkpoint.model, samples, total)

    resumed = measured


@takes(Settings)
def compare(
    targets: Sequence[Any],
    *,
    progress: Callable[[str, int, int], Any] | Watch | None = None,
    out: str | Path | None = None,
    twins: bool = True,
    series: bool = True,
    write: Callable[[Comparison, Path], Any] | None = None,
    **settings: Any,
) -> Comparison:
    """Load and measure models on the same text, one model in memory at a time.

    With `out` every finished part is stored there at once (in `.shards`, until all is done): the
    same call goes on where an earlier one was stopped, however that was. Under `accelerate launch`
    the processes share the work; process 0 has the result, the others an empty one.

    Args:
        targets: Whatever `load` takes, or models in memory. A pattern (`run/step-*`), a folder of
            step checkpoints, or two or more of them side by side are a series: one model, with its
            steps in the column `step`.
        progress: Called with (model, samples done since the last call, samples in all).
        out: Folder of the results: `tables/`, `provenance.json`, `summary.json`, `report.html`, and
            what is unfinished.
        twins: Measure the untrained twin of each configuration too, as `<model>@init`.
        series: Whether steps are one model; otherwise each is a model of its own.
        write: Called with the comparison and `out` instead of writing all that.
        **settings: What to measure and how, as `Settings` describes it: `measures`, `data`,
            `samples`, `tokens`, `seed`, `batch_size`, `device`, `dtype`, `layout`, `loops`,
            `more_loops`, `spec`, `example`, `trust_remote_code`, `device_map`, and the options of
            `measure`.

    Returns:
        The tables, models in the order given, and each model's samples. A target that cannot be
        measured after all is in `failed`.

    Raises:
        InputError: for whatever cannot be found or read before the first model is measured; where
            nothing could be measured; where results cannot be stored, or another command is
            writing to `out`.
    """
    targets = [targets] if isinstance(targets, str | Path) else targets
    how = _checked(settings)
    folder = None if out is None else Path(out).expanduser()
    processes = _joined(how, folder)
    if processes.count > 1 and how.device is not None:
        how = replace(how, device=str(processes.device))
    store = Store(folder, how.data if isinstance(how.data, Items) else None)
    watch = progress if isinstance(progress, Watch) else _Callback(progress)
    with claimed(folder) if folder is not None and processes.main else nullcontext():
        plan = look_up(targets, trust_remote_code=how.trust_remote_code, series=series)
        _check_applies(plan, how)
        if twins:
            plan = with_twins(plan, seed=how.seed)
        _meet(processes, store)
        work = Work(plan, how, store, processes, watch)
        seen = outcomes = work.run()
        if folder is not None:
            outcomes = _gathered(processes, seen)
            if processes.count > 1 and any(outcome.varied for outcome in outcomes):
                # another process saw it after this one had measured its share
                work.run_varied([outcome.varied for outcome in outcomes])
                outcomes = _gathered(processes, seen)
        if not processes.main:
            return Comparison(tables=Tables(), samples={})
        result = merged(plan, outcomes, store, how.batch_size)
        comparison = comparison_of(plan, result, seen)
        if folder is not None:
            keys = [outcome.key for outcome in outcomes if outcome.key]
            _finish(comparison, folder, store, keys, write)
    return comparison


def _gathered(processes: Processes, seen: Sequence[Outcome]) -> list[Outcome]:
    """What all processes saw; few errors can be sent."""
    return joined(processes.gather([replace(outcome, error=None) for outcome in seen]))


# -- before the first checkpoint -----------------------------------------------------------------


def _checked(settings: Mapping[str, Any]) -> Settings:
    """The settings, as far as they can be checked without looking at a target."""
    besides = ("targets", "progress", "out", "twins", "series", "write")
    how: Settings = build_options(Settings, settings, "compare", besides)
    check_seed(how.seed)
    if how.dtype is not None:
        parse_dtype(how.dtype)
    if how.data is not None and are_items(how.data):
        how = replace(how, data=read_items(how.data, how.samples))
    elif how.data is not None:
        check_file(Path(how.data), (*SUFFIXES, ".npy"))
    return how


def _joined(settings: Settings, folder: Path | None) -> Processes:
    """The processes of this launch, each with a device of its own."""
    if launched() > 1 and (folder is None or settings.device_map is not None):
        raise InputError(
            "several processes need an output folder that all of them see; give out (--out)."
            if folder is None
            else "device_map spreads one model over all devices, so it takes one process; leave "
            "it out, or run without accelerate launch."
        )
    return Processes.join(settings.device, patience=PATIENCE)


def _check_applies(plan: Plan, settings: Settings) -> None:
    """Refuse options that apply to none of the models."""
    checkpoints = plan.checkpoints
    if settings.layout is not None:
        Layout.parse(settings.layout)
        if all(checkpoint.plain is False for checkpoint in checkpoints):
            raise InputError(nothing_to_regroup(settings.layout, plan.models))
    if (settings.device or settings.dtype) and not all(
        checkpoint.named for checkpoint in checkpoints
    ):
        raise InputError(
            "device and dtype apply to models that are loaded here, and one is given in memory; "
            "convert it with model.to(...) and leave both out."
        )
    foreign = {name: getattr(settings, name) for name in FOREIGN}
    unused = [name for name, value in foreign.items() if value is not None]
    if unused and not any(checkpoint.foreign for checkpoint in checkpoints):
        raise InputError(
            f"{' and '.join(unused)} apply to foreign models that are loaded here, and none of "
            f"{', '.join(plan.models)} is one; leave {'them' if unused[1:] else 'it'} out."
        )


def nothing_to_regroup(layout: str, names: Sequence[str]) -> str:
    """Say that a layout applies to no model.

    Args:
        layout: The layout.
        names: The models.

    Returns:
        The sentence.
    """
    return (
        f"layout {layout} regroups vanilla models, and none of {', '.join(names)} is one; "
        "leave the layout out."
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


# -- one process's share -------------------------------------------------------------------------


class _NothingToRegroup(InputError):
    """A layout was given, and no model is without a loop."""


class Work:
    """One process goes through its share of the shards, one model in memory at a time."""

    def __init__(
        self, plan: Plan, settings: Settings, store: Store, processes: Processes, watch: Watch
    ) -> None:
        """Look at what there is already.

        Args:
            plan: The checkpoints.
            settings: What to measure.
            store: Where shards go, and are.
            processes: This process among others.
            watch: Is told how it goes.
        """
        self.plan, self.settings, self.store = plan, settings, store
        self.processes, self.watch = processes, watch
        self.outcomes = [Outcome() for _ in plan.checkpoints]
        self._identity = identity(settings) if store.folder is not None else {}
        self._left = [0] * len(plan.checkpoints)
        self._looped: set[int] = set()

    def run(self) -> list[Outcome]:
        """Measure this process's shards.

        Returns:
            What became of each checkpoint, in the plan's order.

        Raises:
            StoreError: if nothing more can be stored.
            InputError: if a layout was given and turns out to apply to no model.
        """
        self._survey()
        for number, outcome in enumerate(self.outcomes):
            if outcome.failed or not self._expected(number) or self._is_orphan(number):
                continue
            try:
                self._measure(number, outcome)
            except (StoreError, _NothingToRegroup):
                raise
            except Exception as error:  # one checkpoint that fails, however, spoils no other
                outcome.failed, outcome.error = _reason(error), error
                self.watch.dropped(self._left[number])
            gc.collect()  # models may refer to themselves; two would not fit into memory
        return self.outcomes

    def _survey(self) -> None:
        """Find the keys of what need not be loaded for that, and count what is done."""
        total = done = 0
        for number, checkpoint in enumerate(self.plan.checkpoints):
            outcome = self.outcomes[number]
            try:
                self._identify(checkpoint, outcome, None)
            except (InputError, OSError) as error:
                outcome.failed, outcome.error = _reason(error), error
                continue
            shards, stored = self._expected(number), 0
            if outcome.key and (samples := Shelf(self.store, outcome.key).samples()) is not None:
                shelf, shards = Shelf(self.store, outcome.key), self._shards(number, samples)
                stored = _count(shard for shard in shards if shelf.has(*shard))
            self._left[number] = _count(shards) - stored
            total, done = total + _count(shards), done + stored
        self.watch.planned(total, done)

    def _is_orphan(self, number: int) -> bool:
        """Whether a checkpoint is the twin of models that all failed."""
        trained = self.plan.checkpoints[number].twin_of
        pairs = zip(self.plan.checkpoints, self.outcomes, strict=True)
        return bool(trained) and not any(
            checkpoint.model in trained and not outcome.failed for checkpoint, outcome in pairs
        )

    def _expected(self, number: int) -> list[tuple[int, int]]:
        """This process's shards of a checkpoint, if the text gives all windows asked for."""
        if isinstance(self.settings.data, Items):
            return self._shards(number, self.settings.data)
        if self.settings.text is not None:
            return self._share(number, 1, self.settings.tokens)
        return self._share(number, self.settings.samples, self.settings.tokens)

    def _shards(self, number: int, samples: Samples | Items) -> list[tuple[int, int]]:
        return self._share(number, len(samples), sample_length(samples))

    def _share(self, number: int, samples: int, tokens: int) -> list[tuple[int, int]]:
        """This process's shards of a checkpoint: every n-th, the first not always process 0's."""
        shards = cuts(samples, tokens, self.settings.batch_size)
        rank, count = self.processes.rank, self.processes.count
        return [shard for i, shard in enumerate(shards) if (number + i) % count == rank]

    def _identify(self, checkpoint: Checkpoint, outcome: Outcome, model: Hooked | None) -> None:
        """Where the shards of a checkpoint are, if that can be told yet."""
        if outcome.key or (self.store.folder is None and model is None):
            return
        if self.store.folder is None:
            outcome.key = key_of({"model": checkpoint.model, "step": checkpoint.step})
            return
        stamp: dict[str, Any] | None
        if checkpoint.named and model is None:
            trusted = self.settings.trust_remote_code
            stamp = stamp_of_target(checkpoint.target, trust_remote_code=trusted)
        else:
            stamp = stamp_of_model(checkpoint.target if model is None else model)
        if stamp is None:
            return
        outcome.stamp = stamp
        name = [checkpoint.model, checkpoint.step]
        outcome.key = key_of({"name": name, "stamp": stamp, "settings": self._identity})

    def _measure(self, number: int, outcome: Outcome) -> None:
        """Measure what is missing of a checkpoint."""
        checkpoint, model = self.plan.checkpoints[number], None
        late = not outcome.key
        if late:
            model = self._load(number)
            self._identify(checkpoint, outcome, model)
        shelf = Shelf(self.store, outcome.key)
        samples = shelf.samples()
        shards = [] if samples is None else self._shards(number, samples)
        if samples is None or not all(shelf.has(*shard) for shard in shards):
            model = model or self._load(number)
            fresh = self._samples(model)
            if samples is None or samples.sha256 != fresh.sha256:
                samples, shards = fresh, self._shards(number, fresh)
                shelf.begin(samples)
                self.watch.dropped(_count(self._expected(number)) - _count(shards))
        measuring = None
        for start, stop in shards:
            if shelf.has(start, stop):
                if late:
                    self.watch.late(stop - start)
                self.watch.resumed(checkpoint, stop - start, len(samples))
                continue
            assert model is not None
            measuring = measuring or self._measuring(model, checkpoint, samples)

            def done(n: int, total: int = len(samples)) -> None:
                self._left[number] -= n
                self.watch.measured(checkpoint, n, total)

            shelf.put(start, stop, measuring.part(start, stop, done))
        if measuring is not None and measuring.varied:
            shelf.mark_varied()
        outcome.varied = shelf.varied
        if outcome.varied:
            self._measure_varied(number, shelf, model, measuring)

    def run_varied(self, varied: Sequence[bool]) -> None:
        """Measure shards anew whose samples turned out to run other numbers of iterations.

        Args:
            varied: Whether that was seen of each checkpoint, by any process.
        """
        for number, outcome in enumerate(self.outcomes):
            if varied[number] and not outcome.failed and outcome.key:
                self._measure_varied(number, Shelf(self.store, outcome.key), None, None)

    def _measure_varied(
        self, number: int, shelf: Shelf, model: Hooked | None, measuring: Measuring | None
    ) -> None:
        """Measure this process's shards that were taken for samples of one number of iterations."""
        checkpoint, samples = self.plan.checkpoints[number], shelf.samples()
        assert samples is not None
        for start, stop in self._shards(number, samples):
            shard = shelf.get(start, stop)
            if shard is not None and _is_varied(shard, checkpoint):
                continue
            if measuring is None:
                measuring = self._measuring(model or self._load(number), checkpoint, samples)
            if not measuring.varied:
                measuring.group_by_count()
            shelf.put(start, stop, measuring.part(start, stop))

    def _samples(self, model: Hooked) -> Samples | Items:
        settings = self.settings
        if isinstance(settings.data, Items):
            return settings.data
        if settings.text is not None:
            return one_text(model, settings.text)
        return load_samples(
            model, settings.data, samples=settings.samples, tokens=settings.tokens,
            seed=settings.seed,
        )  # fmt: skip

    def _measuring(
        self, model: Hooked, checkpoint: Checkpoint, samples: Samples | Items
    ) -> Measuring:
        settings, T, note = self.settings, None, ""
        if any(BY_NAME[name].longer for name in settings.measures):
            T, note = _more_loops(model, settings.more_loops)
        measuring = Measuring(
            model, samples, settings.options(more_loops=T), batch_size=settings.batch_size,
            name=checkpoint.model, step=checkpoint.step,
        )  # fmt: skip
        if note:
            measuring.provenance["notes"].append(note)
        return measuring

    def _load(self, number: int) -> Hooked:
        """The model of a checkpoint, with the iterations and layout asked for."""
        settings, checkpoint = self.settings, self.plan.checkpoints[number]
        loops = None if checkpoint.plain else settings.loops
        if checkpoint.named:
            foreign = {name: getattr(settings, name) for name in FOREIGN}
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
        if model.is_plain:
            return model.with_layout(settings.layout)
        self._looped.add(number)
        if all(
            checkpoint.plain is False or checkpoint.twin_of or i in self._looped
            for i, checkpoint in enumerate(self.plan.checkpoints)
        ):
            raise _NothingToRegroup(nothing_to_regroup(settings.layout, self.plan.models))
        return model


def identity(settings: Settings) -> dict[str, Any]:
    """Everything that decides a result but the checkpoint.

    Args:
        settings: What is measured.

    Returns:
        JSON values, equal only where results are.
    """
    stamps = {
        "data": stamp_of_data(settings.data),
        "spec": stamp_of_spec(settings.spec),
        "example": stamp_of_example(settings.example),
        "loss": stamp_of_function(settings.loss),
        "device": (settings.device or "cpu").partition(":")[0],
    }
    names = [entry.name for entry in fields(settings) if entry.name != "trust_remote_code"]
    values = {name: getattr(settings, name) for name in names}
    return {**values, **stamps, "versions": [versions(), commit(), SCHEMAS]}


def _is_varied(shard: Tables, checkpoint: Checkpoint) -> bool:
    return "groups" in shard.provenance["models"][checkpoint.model]


def _count(shards: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in shards)


def _more_loops(model: Hooked, requested: int | None) -> tuple[int | None, str]:
    """Iterations to run besides a model's own, and what to note."""
    K = model.K
    if requested == 0 or K == 0:
        return None, ""
    if requested is not None and requested <= K:
        return None, f"more loops: {requested} are not more than its own {K}"
    return 2 * K if requested is None else requested, ""


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# -- after the last checkpoint -------------------------------------------------------------------


def _finish(
    comparison: Comparison,
    folder: Path,
    store: Store,
    keys: Sequence[str],
    write: Callable[[Comparison, Path], Any] | None,
) -> None:
    """Write the results, then remove the shards that they are made of."""
    if size := store.size(besides=keys):
        comparison.remarks.append(
            f"{store.folder} holds {size / 1e6:.1f} MB of another command that was not finished; "
            "give that one again, or remove the folder"
        )
    if comparison.incomplete:
        comparison.remarks.append(
            f"{store.folder} keeps what was measured: once the rest can be read, the same command "
            "measures only that"
        )
    try:
        (write or save_with_report)(comparison, folder)
    except (InputError, OSError) as error:
        reason = str(error) if isinstance(error, InputError) else f"{error.strerror or error}."
        raise InputError(
            f"{reason} What was measured is kept in {store.folder}; the same command goes on."
        ) from error
    if not comparison.incomplete:
        store.remove(keys)


__all__ = ["Comparison", "Watch", "Work", "compare", "identity"]
