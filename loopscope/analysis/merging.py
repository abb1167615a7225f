"""Merging: the shards of all checkpoints, of whatever process, become one set of tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loopscope.analysis.comparing import Result
from loopscope.analysis.shards import Shelf, Store, cuts
from loopscope.analysis.tables import Tables
from loopscope.analysis.targets import Checkpoint, Plan
from loopscope.data import Samples
from loopscope.errors import InputError


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


__all__ = ["Merged", "joined", "merged"]
