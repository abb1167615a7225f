"""Comparison: what `compare` gives."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from loopscope.analysis.collapse import NEEDED
from loopscope.analysis.tables.frames import Tables
from loopscope.analysis.tables.registry import TABLES
from loopscope.files import write_csv, write_json, write_provenance
from loopscope.text.windows import Samples

if TYPE_CHECKING:
    from loopscope.analysis.collapse.findings import Findings


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
    samples: dict[str, Samples]
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
        return [name for name, told in models.items() if told and told.get("twin_of")]

    @property
    def notes(self) -> list[str]:
        """What a reader should know beside the numbers: fewer windows than asked for, and such."""
        found = []
        for name, samples in self.samples.items():
            if name in self.added:
                continue
            wanted = samples.provenance.get("requested", len(samples))
            if len(samples) < wanted:
                found.append(f"{name}: the text gave {len(samples)} windows of {wanted} asked for")
            provenance = self.tables.provenance["models"][name]
            kinds = ("loss", "readout", "more loops")
            told = [n for n in provenance["notes"] if "n_ctx" in n or n.startswith(kinds)]
            found += [f"{name}: {note}" for note in told]
            if unused := provenance["training"].get("unused_weights"):
                more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
                found.append(f"{name}: weights not used: {', '.join(unused[:3])}{more}")
        for table, frame in self.tables.frames().items():
            broken = frame[frame["flag"].eq("nonfinite")] if "flag" in frame else frame[:0]
            broken = broken.astype({"model": object})
            for (model, step), rows in broken.groupby(["model", "step"], dropna=False):
                count = rows["sample"].nunique()
                where = f", step {step}" if isinstance(step, int) else ""
                found.append(
                    f"{model}{where}: NaN or infinite values in {count} samples of table {table}"
                )
        if len({samples.sha256 for samples in self.samples.values()}) > 1:
            found.append(
                "the models have different tokenizers, so their windows differ; losses per token "
                "cannot be compared between them"
            )
        for name, steps in self.missing.items():
            more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
            found.append(f"{name}: no checkpoint of step {', '.join(map(str, steps[:8]))}{more}")
        found += [f"not measured: {target}: {reason}" for target, reason in self.failed]
        return found + self.remarks

    @cached_property
    def findings(self) -> "Findings":
        """Signs of collapse, differences and verdicts; computed when first asked for."""
        from loopscope.analysis.collapse.findings import Findings

        return Findings(self)

    @property
    def signs(self) -> pd.DataFrame:
        """Loss and signs of collapse, mean and interval over samples (see `collapse.SIGNS`)."""
        return self.findings.signs

    def with_verdict(self, wanted: Iterable[str]) -> list[str]:
        """The checkpoints with one of these verdicts, in words; untrained twins are not looked at.

        Args:
            wanted: Names of verdicts.
        """
        names, found = set(wanted), self.findings
        there = {key: one.verdict for key, one in found.verdicts.items() if one.verdict in names}
        return [f"{found.label(key)} is {verdict}" for key, verdict in there.items()]

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
                "verdict": one.verdict,
                "between": ", ".join(one.between),
                "evidence": "; ".join(one.evidence),
            }
            for key, one in self.findings.verdicts.items()
        ]
        names = ["model", "step", "loop", "verdict", "between", "evidence"]
        return pd.DataFrame(rows, columns=names).astype({"step": "Int64"})

    @property
    def differences(self) -> pd.DataFrame:
        """Every checkpoint against the first model (see `collapse.differences`)."""
        return self.findings.differences

    def summary(self, *, command: str | None = None) -> dict[str, Any]:
        """The contents of `summary.json`, as docs/SUMMARY.md describes them.

        Args:
            command: The command line that made it.
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


def save_comparison(
    found: Comparison, folder: Path, *, command: str | None = None
) -> dict[str, Any] | None:
    """Write everything but figures and report.

    Args:
        found: What `compare` gave.
        folder: Gets `tables/*.parquet` and `provenance.json`; where there are signs of collapse,
            `tables/signs.csv`, `tables/differences.csv` and `summary.json` too.
        command: The command line that made it.

    Returns:
        The summary; None where there are no signs.

    Raises:
        InputError: where it cannot be written.
    """
    found.tables.save(folder / "tables")
    write_provenance(found.tables.provenance, folder)
    if not {*NEEDED} <= found.tables.frames().keys():
        return None
    write_csv(found.signs, folder / "tables" / "signs.csv")
    write_csv(found.differences, folder / "tables" / "differences.csv")
    summary = found.summary(command=command)
    write_json(summary, folder / "summary.json")
    return summary


def save_with_report(found: Comparison, folder: Path) -> None:
    """Write what `save_comparison` does and, where there are signs, `report.html`.

    Args:
        found: What `compare` gave.
        folder: Where to.

    Raises:
        InputError: where it cannot be written.
    """
    if summary := save_comparison(found, folder):
        from loopscope.report import write_report

        write_report(
            summary, found.tables, folder / "report.html", provenance=found.tables.provenance
        )


__all__ = ["Comparison", "save_comparison", "save_with_report"]
