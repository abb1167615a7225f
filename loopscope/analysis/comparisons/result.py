"""Comparison: what `compare` gives, and how it is put together from shards."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from loopscope.analysis.collapse import NEEDED
from loopscope.analysis.comparisons.plan import Checkpoint, Plan
from loopscope.analysis.comparisons.store import Shelf, Store, cuts, sample_length
from loopscope.analysis.measuring import Items
from loopscope.analysis.tables import BY_NAME, INSIDE_MEASURES, TABLES, Tables
from loopscope.errors import InputError
from loopscope.files import write_csv, write_json, write_provenance
from loopscope.names import KEYS
from loopscope.text import Samples

if TYPE_CHECKING:
    from loopscope.analysis.collapse import Findings


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several models measured on the same text.

    Attributes:
        tables: The tables of all models; the steps of a series under one name.
        samples: The samples of each model, by its name in the tables.
        failed: Targets that could not be measured, with the reason.
        missing: Steps that a series leaves out though its others are regular, by its name.
        twins: Name of each model's untrained twin, where there is one.
        incomplete: Whether a target failed that was named by itself, not as a step of a series.
        remarks: Further notes.
    """

    tables: Tables
    samples: dict[str, Samples | Items]
    failed: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    incomplete: bool = False
    remarks: list[str] = field(default_factory=list)

    @property
    def reference(self) -> str | None:
        """The first model: what the others are compared with."""
        return next(iter(self.tables.models), None)

    @property
    def added(self) -> list[str]:
        """Untrained twins that nobody named."""
        models = self.tables.provenance.get("models", {})
        return [name for name, record in models.items() if record and record.get("twin_of")]

    @property
    def notes(self) -> list[str]:
        """What a reader should know beside the numbers: fewer windows than asked for, and such."""
        notes = []
        for name, samples in self.samples.items():
            if name not in self.added:
                record = self.tables.provenance["models"][name]
                notes += [f"{name}: {note}" for note in _notes_on_model(samples, record)]
        for table, frame in self.tables.frames().items():
            notes += _notes_on_flags(table, frame)
        if {*NEEDED} <= self.tables.frames().keys():
            notes += self.findings.cautions
        if len({samples.sha256 for samples in self.samples.values()}) > 1:
            notes.append(
                "the models have different tokenizers, so their windows differ; losses per token "
                "cannot be compared between them"
            )
        for name, steps in self.missing.items():
            numbers = _first(list(map(str, steps)), 8)
            notes.append(f"{name}: no checkpoint of step {numbers}")
        notes += [f"not measured: {target}: {reason}" for target, reason in self.failed]
        return notes + self.remarks

    @cached_property
    def findings(self) -> "Findings":
        """Signs of collapse, differences and verdicts; computed when first asked for."""
        from loopscope.analysis.collapse import Findings

        return Findings(
            self.tables,
            windows=self.samples,
            reference=self.reference,
            added=self.added,
            twins=self.twins,
            missing=self.missing,
            failed=self.failed,
            notes=lambda: self.notes,
        )

    @property
    def signs(self) -> pd.DataFrame:
        """Loss and signs of collapse, mean and interval over samples (see `collapse.SIGNS`)."""
        return self.findings.signs

    def with_verdict(self, wanted: Iterable[str]) -> list[str]:
        """Name the checkpoints with some verdicts or findings; twins are not looked at.

        Args:
            wanted: Names of verdicts and findings. An uncertain verdict counts where all that are
                left are wanted.

        Returns:
            A sentence for each.
        """
        names, findings = set(wanted), self.findings
        return [
            f"{findings.label(key)} is {words}"
            for key, verdict in findings.verdicts.items()
            if (words := verdict.among(names))
        ]

    def __repr__(self) -> str:
        counts = sorted({len(samples) for samples in self.samples.values()})
        failed = f", {len(self.failed)} not measured" if self.failed else ""
        names = ", ".join(self.samples) or "nothing"
        return f"Comparison of {names} on {'/'.join(map(str, counts))} samples{failed}"

    def __getattr__(self, name: str) -> Any:
        """Tables by name, so that `ls.plot.loss_per_loop(comparison)` and the like work."""
        if name in (*TABLES, "frames", "models", "provenance"):
            return getattr(self.tables, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def verdicts(self) -> pd.DataFrame:
        """A row for each checkpoint: model, step, loop, verdict, between, evidence."""
        rows = [
            {
                **key._asdict(),
                "verdict": verdict.verdict,
                "between": ", ".join(verdict.between),
                "evidence": "; ".join(verdict.evidence),
            }
            for key, verdict in self.findings.verdicts.items()
        ]
        names = [*KEYS, "verdict", "between", "evidence"]
        return pd.DataFrame(rows, columns=names).astype({"step": "Int64"})

    @property
    def differences(self) -> pd.DataFrame:
        """Every checkpoint against the first model (see `collapse.differences`)."""
        return self.findings.differences

    def summary(self, *, command: str | None = None) -> dict[str, Any]:
        """The contents of `summary.json`, as docs/SUMMARY.md describes them.

        Args:
            command: The command line that made it.

        Returns:
            JSON values; numbers that are not finite are None.
        """
        return self.findings.summary(command=command)

    def report(self, path: str | Path) -> Path:
        """Write the report: one HTML file that needs nothing else.

        Args:
            path: Where to.

        Returns:
            The path.

        Raises:
            InputError: where it cannot be written.
        """
        from loopscope.report import write_report

        summary, target = self.summary(), Path(path).expanduser()
        return write_report(summary, self.tables, target, provenance=self.tables.provenance)

    def _repr_html_(self) -> str:
        from loopscope.report import verdict_html

        return verdict_html(self.summary())


def _notes_on_model(samples: Samples | Items, record: Mapping[str, Any]) -> list[str]:
    """What was left out of one model, from its provenance."""
    notes = []
    requested = samples.provenance.get("requested", len(samples))
    if len(samples) < requested:
        notes.append(f"the text gave {len(samples)} windows of {requested} asked for")
    kinds = ("loss", "readout", "more loops", "positions", "loops", *INSIDE_TABLES)
    if repeated := samples.provenance.get("repeated", 0):
        notes.append(f"{repeated} windows that are equal to others were left out")
    notes += [note for note in record["notes"] if "n_ctx" in note or note.startswith(kinds)]
    if unused := record["training"].get("unused_weights"):
        notes.append(f"weights not used: {_first(unused, 3)}")
    return notes


INSIDE_TABLES = tuple(BY_NAME[name].tables[0].name for name in INSIDE_MEASURES)
"""How the notes of what looks inside begin."""


def _notes_on_flags(table: str, frame: pd.DataFrame) -> list[str]:
    """Which checkpoints have values that are not finite in a table."""
    broken = frame[frame["flag"].eq("nonfinite")] if "flag" in frame else frame[:0]
    broken = broken.astype({"model": object})
    notes = []
    for (model, step), rows in broken.groupby(["model", "step"], dropna=False):
        count = rows["sample"].nunique()
        where = f", step {step}" if isinstance(step, int) else ""
        notes.append(f"{model}{where}: NaN or infinite values in {count} samples of table {table}")
    return notes


def _first(names: Sequence[str], count: int) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


# -- from shards to a comparison -----------------------------------------------------------------


@dataclass(kw_only=True)
class Outcome:
    """What became of one checkpoint.

    Attributes:
        key: Where its shards are; empty if it could not even be looked at.
        stamp: What its weights were told by.
        failed: Why it could not be measured; empty if it could.
        error: What was raised then, in this process.
        varied: Whether the number of iterations was seen to depend on the sample.
    """

    key: str = ""
    stamp: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    error: BaseException | None = None
    varied: bool = False


@dataclass(kw_only=True)
class Merged:
    """What was measured, and what could not be.

    Attributes:
        tables: The tables; None where nothing was measured.
        samples: The samples of each model.
        failed: Checkpoints that could not be measured, with the reason.
    """

    tables: Tables | None = None
    samples: dict[str, Samples | Items] = field(default_factory=dict)
    failed: list[tuple[Checkpoint, str]] = field(default_factory=list)


def joined(of_processes: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Put together what each process saw.

    Args:
        of_processes: The outcomes of each process.

    Returns:
        What became of each checkpoint.
    """
    outcomes = []
    for seen in zip(*of_processes, strict=True):
        keyed = next((outcome for outcome in seen if outcome.key), seen[0])
        failed = next((outcome for outcome in seen if outcome.failed), keyed)
        outcomes.append(
            Outcome(
                key=keyed.key,
                stamp=keyed.stamp,
                failed=failed.failed,
                error=failed.error,
                varied=any(outcome.varied for outcome in seen),
            )
        )
    return outcomes


def merged(plan: Plan, outcomes: Sequence[Outcome], store: Store, batch_size: int) -> Merged:
    """Make tables of the shards of all checkpoints, of whatever process.

    Args:
        plan: The checkpoints.
        outcomes: What became of each, over all processes.
        store: Where the shards are.
        batch_size: As they were measured with.

    Returns:
        Tables in the plan's order. The provenance of a model has its target and stamp besides, of
        a series those of every step.

    Raises:
        InputError: if a shard cannot be seen from here.
    """
    result, parts = Merged(), []
    same: dict[str, Samples | Items] = {}
    records: dict[str, dict[str, Any]] = {}
    for checkpoint, outcome in zip(plan.checkpoints, outcomes, strict=True):
        if checkpoint.twin_of and not result.samples.keys() & {*checkpoint.twin_of}:
            continue  # nobody asked for it, and what it is the twin of was not measured
        if outcome.failed:
            result.failed.append((checkpoint, outcome.failed))
            continue
        shelf = Shelf(store, outcome.key)
        samples = shelf.samples()
        if samples is None:
            raise _unseen(checkpoint, store)
        samples = same.setdefault(samples.sha256, samples)
        first = result.samples.setdefault(checkpoint.model, samples)
        if first.sha256 != samples.sha256:
            reason = "its tokenizer is not that of the run's first step, so its samples differ"
            result.failed.append((checkpoint, reason))
            continue
        places = cuts(len(samples), sample_length(samples), batch_size)
        shards = [shard for place in places if (shard := shelf.get(*place)) is not None]
        if len(shards) < len(places):
            raise _unseen(checkpoint, store)
        parts += shards
        record = shards[0].provenance["models"][checkpoint.model]
        _note_origin(records.setdefault(checkpoint.model, record), checkpoint, outcome)
    result.tables = Tables.join(parts) if parts else None
    return result


def _note_origin(record: dict[str, Any], checkpoint: Checkpoint, outcome: Outcome) -> None:
    """Put target, stamp, step and twins into a model's provenance."""
    origin: dict[str, Any] = {"target": str(checkpoint.target) if checkpoint.named else None}
    if outcome.stamp:
        origin["stamp"] = outcome.stamp
    if "target" not in record:
        record |= origin
    if checkpoint.twin_of:
        record["twin_of"] = list(checkpoint.twin_of)
    if checkpoint.step is not None:
        record.setdefault("steps", {})[str(checkpoint.step)] = origin


def _unseen(checkpoint: Checkpoint, store: Store) -> InputError:
    where = store.folder or "memory"
    return InputError(
        f"shards of {checkpoint.label} cannot be seen in {where}: --out must be a folder that all "
        "processes share, and nothing else may write to it. Give the same command again."
    )


def comparison_of(plan: Plan, result: Merged, outcomes: Sequence[Outcome]) -> Comparison:
    """Make the result, with all that was left out.

    Args:
        plan: The checkpoints.
        result: What was measured of them.
        outcomes: What became of each in this process, for the cause of an error.

    Returns:
        The comparison.

    Raises:
        InputError: if nothing but twins was measured.
    """
    named = [(checkpoint, why) for checkpoint, why in result.failed if not checkpoint.twin_of]
    asked = [checkpoint for checkpoint in plan.checkpoints if not checkpoint.twin_of]
    if len(named) == len(asked) or result.tables is None:
        raise _nothing_measured(named, outcomes)
    remarks = list(plan.notes)
    for checkpoint, why in result.failed:
        if checkpoint.twin_of:
            remarks.append(f"{', '.join(checkpoint.twin_of)}: no untrained twin: {why}")
    failed = [*plan.failed]
    for checkpoint, why in named:
        failed.append((str(checkpoint.target) if checkpoint.named else checkpoint.label, why))
    measured = result.samples
    twins = {name: twin for name, twin in plan.twins.items() if {name, twin} <= measured.keys()}
    result.tables.provenance["comparison"] = {
        "twins": twins,
        "missing": plan.missing,
        "failed": [list(pair) for pair in failed],
    }
    return Comparison(
        tables=result.tables,
        samples=measured,
        failed=failed,
        missing=plan.missing,
        twins=twins,
        incomplete=any(checkpoint.step is None for checkpoint, _ in named),
        remarks=remarks,
    )


def _nothing_measured(
    failed: Sequence[tuple[Checkpoint, str]], outcomes: Sequence[Outcome]
) -> InputError:
    cause = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    reasons = {why: checkpoint for checkpoint, why in reversed(failed)}
    if len(reasons) == 1:
        error = InputError(failed[0][1])
    else:
        each = "; ".join(
            f"{checkpoint.label}: {why}" for why, checkpoint in reversed(reasons.items())
        )
        error = InputError(f"none of the checkpoints can be measured: {each}")
    error.__cause__ = cause
    return error


# -- in a folder ---------------------------------------------------------------------------------


def save_comparison(
    comparison: Comparison, folder: Path, *, command: str | None = None
) -> dict[str, Any] | None:
    """Write everything but figures and report.

    Args:
        comparison: What `compare` gave.
        folder: Gets `tables/*.parquet` and `provenance.json`; where there are signs of collapse,
            `tables/signs.csv`, `tables/differences.csv` and `summary.json` too.
        command: The command line that made it.

    Returns:
        The summary; None where there are no signs.

    Raises:
        InputError: where it cannot be written.
    """
    comparison.tables.save(folder / "tables")
    write_provenance(comparison.tables.provenance, folder)
    if not {*NEEDED} <= comparison.tables.frames().keys():
        return None
    write_csv(comparison.signs, folder / "tables" / "signs.csv")
    write_csv(comparison.differences, folder / "tables" / "differences.csv")
    summary = comparison.summary(command=command)
    write_json(summary, folder / "summary.json")
    return summary


def save_with_report(comparison: Comparison, folder: Path) -> None:
    """Write what `save_comparison` does and, where there are signs, `report.html`.

    Args:
        comparison: What `compare` gave.
        folder: Where to.

    Raises:
        InputError: where it cannot be written.
    """
    if summary := save_comparison(comparison, folder):
        from loopscope.report import write_report

        write_report(
            summary,
            comparison.tables,
            folder / "report.html",
            provenance=comparison.tables.provenance,
        )


__all__ = [
    "Comparison", "Merged", "Outcome", "comparison_of", "joined", "merged", "save_comparison",
    "save_with_report",
]  # fmt: skip
