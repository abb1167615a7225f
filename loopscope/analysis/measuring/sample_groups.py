"""Groups of samples: of one form and shape, and of one number of iterations.

Samples of a batch must run the same iterations. A model that loops as often as its input asks for
(ACT) is wrapped once for each number, on a sample that runs it, and each group is measured as a
loop of its own: `core[K=3]`.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from loopscope.analysis.measuring.sample_items import to_device
from loopscope.analysis.tables import Tables, renumbered
from loopscope.errors import LoopCountError
from loopscope.models import Hooked, Trajectory


@runtime_checkable
class Grouped(Protocol):
    """What is asked of `streaming.Measuring`."""

    model: Hooked
    samples: Any
    provenance: dict[str, Any]
    batch_size: int

    def __len__(self) -> int:
        """Number of samples."""

    def of_group(
        self,
        numbers: Sequence[int],
        model: Hooked,
        *,
        label: Callable[[Trajectory], Trajectory] | None,
        shows_tokens: bool,
    ) -> Any:
        """Measure some of the samples by themselves.

        Args:
            numbers: Which.
            model: The model for them.
            label: Renames the loops of a trajectory.
            shows_tokens: Whether its first sample stands in the table `tokens`.

        Returns:
            Their own measuring.
        """


@dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Samples that are measured together.

    Attributes:
        numbers: Which, in order.
        measuring: Their own measuring.
    """

    numbers: list[int]
    measuring: Any


class Told:
    """Passes progress on, and what is done a second time once."""

    def __init__(self, progress: Callable[[int], Any] | None) -> None:
        self._progress, self._total, self._now = progress, 0, 0

    def __call__(self, count: int) -> None:
        """Tell that samples are done.

        Args:
            count: How many.
        """
        self._now += count
        if self._now > self._total and self._progress is not None:
            self._progress(self._now - self._total)
        self._total = max(self._total, self._now)

    def again(self) -> None:
        """Begin anew."""
        self._now = 0


def groups_by_kind(measuring: Grouped) -> list[SampleGroup]:
    """Group items of one form and shape.

    Args:
        measuring: The measuring of all.

    Returns:
        The groups, in order of first appearance.
    """
    return [
        SampleGroup(
            numbers=numbers,
            measuring=measuring.of_group(
                numbers, measuring.model, label=None, shows_tokens=numbers[0] == 0
            ),
        )
        for numbers in _numbers_by(measuring.samples.kinds)
    ]


def groups_by_count(measuring: Grouped) -> list[SampleGroup]:
    """Group samples that run the same iterations, each sample by itself.

    Args:
        measuring: The measuring of all; its provenance notes the groups.

    Returns:
        The groups, those of fewer iterations first.
    """
    model, samples = measuring.model, measuring.samples
    alone = (samples.batch(range(i, i + 1)) for i in range(len(measuring)))
    counts = [model.calls_on(to_device(inputs, model.input_device)) for inputs in alone]
    models: dict[Hashable, Hooked] = {}
    for numbers in _numbers_by(counts):
        models[counts[numbers[0]]] = _wrapped_on(measuring, numbers, counts)
    several = len({tuple(of_count.loops.items()) for of_count in models.values()}) > 1
    label = labelled if several else None
    pairs = list(zip(counts, samples.kinds, strict=True))
    groups = []
    for numbers in sorted(_numbers_by(pairs), key=lambda ns: (models[counts[ns[0]]].K, ns)):
        of_count = models[counts[numbers[0]]]
        shown = numbers[0] == counts.index(counts[numbers[0]])
        group = measuring.of_group(numbers, of_count, label=label, shows_tokens=shown)
        groups.append(SampleGroup(numbers=numbers, measuring=group))
    _note(measuring, groups, several)
    return groups


def _wrapped_on(measuring: Grouped, numbers: Sequence[int], counts: Sequence[Hashable]) -> Hooked:
    """The model with the iterations of some samples: wrapped on two where those run them too."""
    model, samples, first = measuring.model, measuring.samples, numbers[0]
    alike = [i for i in numbers[:2] if samples.kinds[i] == samples.kinds[first]]
    for chosen in (alike, [first]):
        inputs = samples.chosen(chosen).batch(range(len(chosen)))
        inputs = to_device(inputs, model.input_device)
        if len(chosen) == 1 or model.calls_on(inputs) == counts[first]:
            return model.wrapped_on(inputs)
    raise AssertionError  # a sample by itself is always taken


def labelled(trajectory: Trajectory) -> Trajectory:
    """Name the loops of a trajectory after their numbers of iterations.

    Args:
        trajectory: Of the main loop.

    Returns:
        The same, with names such as `core[K=3]`.
    """
    others = {label(name, loop.K): loop for name, loop in trajectory.others.items()}
    others = {name: replace(loop, loop=name) for name, loop in others.items()}
    return replace(trajectory, loop=label(trajectory.loop, trajectory.K), others=others)


def label(loop: str, K: int) -> str:
    """Name a loop of samples that run it K times.

    Args:
        loop: Its name.
        K: Iterations.

    Returns:
        Such as `core[K=3]`.
    """
    return f"{loop}[K={K}]"


def joined_groups(
    measuring: Grouped,
    groups: Sequence[SampleGroup],
    start: int,
    stop: int,
    progress: Callable[[int], Any],
) -> Tables:
    """Measure the samples of a part, group by group.

    Args:
        measuring: The measuring of all, whose provenance is completed.
        groups: Its groups.
        start: The first sample.
        stop: The one after the last.
        progress: Called with the number of samples done since the last call.

    Returns:
        Their tables, under the numbers of the whole.
    """
    parts = []
    for group in groups:
        first, last = (bisect_left(group.numbers, place) for place in (start, stop))
        if first == last:
            continue
        tables = _measured(group, first, last, progress, alone="groups" in measuring.provenance)
        for frame in tables.frames().values():
            if len(frame):
                renumbered(frame, group.numbers)
        parts.append(tables)
        _complete(measuring.provenance, group.measuring.provenance)
    joined = Tables.join(parts)
    name = next(iter(joined.provenance["models"]))
    joined.provenance = {"models": {name: measuring.provenance}}
    return joined


def _measured(
    group: SampleGroup, first: int, last: int, progress: Callable[[int], Any], *, alone: bool
) -> Tables:
    """The tables of a group; sample by sample where a batch does not run what each of it does."""
    told = Told(progress)
    try:
        tables: Tables = group.measuring.measured(first, last, told)
    except LoopCountError:
        if not alone or group.measuring.batch_size == 1:
            raise
        group.measuring.batch_size = 1
        told.again()
        tables = group.measuring.measured(first, last, told)
    return tables


def _complete(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Take what became known in a group into the provenance of all."""
    whole["notes"] = list(dict.fromkeys([*whole["notes"], *part["notes"]]))
    if "states" in part:
        seen = whole.setdefault("states", {})
        for loop, shape in part["states"].items():
            # of several lengths none is that of all
            pairs = zip(seen.get(loop, shape), shape, strict=True)
            seen[loop] = [a if a == b else None for a, b in pairs]


def _note(measuring: Grouped, groups: Sequence[SampleGroup], several: bool) -> None:
    entries: dict[tuple[tuple[str, int], ...], int] = {}
    for group in groups:
        loops = tuple(group.measuring.model.loops.items())
        entries[loops] = entries.get(loops, 0) + len(group.numbers)
    measuring.provenance["groups"] = [
        {"loops": {label(n, K) if several else n: K for n, K in loops}, "samples": count}
        for loops, count in entries.items()
    ]
    words = [
        f"{count} {'sample runs' if count == 1 else 'samples run'} "
        + (", ".join(f"{K} of {name}" for name, K in loops) or "none")
        for loops, count in entries.items()
    ]
    note = f"loops: the number of iterations depends on the sample: {'; '.join(words)}"
    if several:
        note += "; each number is measured as a loop of its own, by the samples that run it"
    else:
        only = groups[0].measuring.model
        measuring.provenance.update(only.structure(), config=only.config.to_dict())
    measuring.provenance["notes"] = [*measuring.provenance["notes"], note]


def _numbers_by(values: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of equal values, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for number, value in enumerate(values):
        groups.setdefault(value, []).append(number)
    return list(groups.values())


__all__ = [
    "SampleGroup", "Told", "groups_by_count", "groups_by_kind", "joined_groups", "label",
    "labelled",
]  # fmt: skip
