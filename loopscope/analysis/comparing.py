"""Comparing: one process goes through its share of the shards, one model in memory at a time."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopscope.analysis.course import iterations
from loopscope.analysis.measure import Measuring
from loopscope.analysis.provenance import commit, versions
from loopscope.analysis.shards import Shelf, Store, StoreError, cuts, key_of
from loopscope.analysis.stamps import (
    stamp_of_data,
    stamp_of_model,
    stamp_of_spec,
    stamp_of_target,
)
from loopscope.analysis.tables import SCHEMAS
from loopscope.analysis.targets import Checkpoint, Plan
from loopscope.data import Samples, load_samples
from loopscope.errors import InputError
from loopscope.models.load import load
from loopscope.processes import Processes


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


__all__ = ["Comparing", "Result", "Settings", "Watch", "is_plain", "nothing_to_regroup"]
