"""Findings: what a comparison tells, and its one JSON value (`summary.json`, docs/SUMMARY.md)."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from loopscope._version import __version__
from loopscope.analysis.collapse.clusters import Clusters, cautions, clusters_of
from loopscope.analysis.collapse.conditions import Estimate
from loopscope.analysis.collapse.criteria import SIGNS, THRESHOLDS, YARDSTICKS, Sign
from loopscope.analysis.collapse.sign_values import Key, by_key, per_sample, without_spread
from loopscope.analysis.collapse.statistics import differences, paired_difference, summarised
from loopscope.analysis.collapse.verdicts import Verdict, judge, label, onset
from loopscope.analysis.collapse.yardsticks import unigram_losses
from loopscope.analysis.tables import Tables, model_record, model_records, sound
from loopscope.errors import InputError
from loopscope.names import KEYS, block_number

FORMAT, VERSION = "loopscope-summary", 2


@runtime_checkable
class Windows(Protocol):
    """What is asked of the windows of tokens that a model read (`text.windows.Samples`)."""

    @property
    def tokens(self) -> Any:
        """Ids, one row per window: an array or tensor of shape (sample, pos); None of others."""

    @property
    def source(self) -> str:
        """Where the text came from."""

    @property
    def sha256(self) -> str:
        """Equal only for equal windows."""

    @property
    def options(self) -> Mapping[str, Any]:
        """How the windows were chosen: `seed`."""

    def __len__(self) -> int: ...


class Findings:
    """Everything that follows from a comparison: signs, differences, verdicts, series.

    Each is computed when it is first asked for.
    """

    def __init__(
        self,
        tables: Tables,
        *,
        windows: Mapping[str, Windows] | None = None,
        reference: str | None = None,
        added: Sequence[str] = (),
        twins: Mapping[str, str] | None = None,
        missing: Mapping[str, Sequence[int]] | None = None,
        failed: Sequence[tuple[str, str]] = (),
        notes: Callable[[], Sequence[str]] = tuple,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        """Take what was measured; `Comparison.findings` does it for a comparison.

        Args:
            tables: Of all models; update, cka and rank at least.
            windows: What each model read, by its name in the tables.
            reference: The model that others are held against; the first when not given.
            added: Untrained twins that nobody named; they get no verdict.
            twins: Name of each model's untrained twin, where there is one.
            missing: Steps that a series leaves out though its others are regular, by its name.
            failed: Targets that could not be measured, with the reason.
            notes: Gives what a reader should know beside the numbers, when the summary is made.
            thresholds: Other values for some of `collapse.THRESHOLDS`, by name.

        Raises:
            InputError: for a whole comparison, which has findings of its own.
        """
        if not isinstance(tables, Tables):
            raise InputError(
                f"Findings takes Tables, given {type(tables).__name__}; of a comparison write "
                "comparison.findings, with other thresholds comparison.findings.with_thresholds()."
            )
        self.tables = tables
        self.windows = dict(windows or {})
        self.reference = next(iter(tables.models), None) if reference is None else reference
        self.added = tuple(added)
        self.twins = dict(twins or {})
        self.missing = dict(missing or {})
        self.failed, self.notes = list(failed), notes
        self.thresholds = dict(thresholds or {})

    def with_thresholds(self, thresholds: Mapping[str, float]) -> "Findings":
        """Judge the same measurements by other thresholds.

        Args:
            thresholds: Other values for some of `collapse.THRESHOLDS`, by name.

        Returns:
            New findings; these stay as they are.
        """
        findings = copy(self)
        findings.__dict__.pop("verdicts", None)
        findings.thresholds = {**self.thresholds, **thresholds}
        return findings

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The signs of every sample (`collapse.per_sample`)."""
        return per_sample(self.tables)

    @cached_property
    def signs(self) -> pd.DataFrame:
        """Mean and interval of each sign (`collapse.signs`)."""
        return summarised(self.samples, self.tables)

    @cached_property
    def verdicts(self) -> dict[Key, Verdict]:
        """The verdict on every checkpoint and loop that the user named."""
        named = self.signs[~self.signs["model"].isin(self.added)]
        return judge(
            named, thresholds=self.thresholds, loopless=loopless(self.tables),
            yardsticks=self.yardsticks, own_losses=self.own_losses,
        )  # fmt: skip

    @cached_property
    def own_losses(self) -> dict[str, str]:
        """The models that were measured with a loss of the user's, and its name."""
        records = model_records(self.tables.provenance)
        return {record.name: name for record in records if (name := record.options.get("loss"))}

    @cached_property
    def yardsticks(self) -> dict[Key, dict[str, Estimate]]:
        """The loss of each checkpoint over others on the same samples (`YARDSTICKS`), by name."""
        return {key: self._yardsticks(key) for key in self._by_key if key.model not in self.added}

    def _yardsticks(self, key: Key) -> dict[str, Estimate]:
        rows = self._by_key[key]
        twin, against = self._twin(key), self._against(key)
        others = {
            "over_unigram": self._unigram.get(key.model),
            "over_one_loop": self._one_loop.get(key),
            "over_untrained": None if twin is None or twin[0] == key else twin[1]["loss"],
            "over_reference": None,
        }
        if against is not None and self._same_tokens(key.model, against.model):
            others["over_reference"] = self._by_key[against]["loss"]
        differences = {
            name: paired_difference(rows["loss"], loss, self._clusters[key])
            for name, loss in others.items()
            if loss is not None
        }
        return {
            name: Estimate(d.mean, d.low, d.high, d.n, clusters=d.clusters)
            for name, d in differences.items()
            if d is not None
        }

    @cached_property
    def _unigram(self) -> dict[str, pd.Series]:
        """Loss of a unigram on the windows of each model, by sample."""
        losses: dict[str, pd.Series] = {}
        same: dict[str, np.ndarray] = {}
        parts: dict[str, list[pd.Series]] = {}
        for key, rows in self._by_key.items():
            parts.setdefault(key.model, []).append(rows["document"].astype(object))
        documents = {model: _by_sample(of_loops) for model, of_loops in parts.items()}
        for model, windows in self.windows.items():
            if windows.tokens is None or model in self.own_losses:
                continue
            if model in documents and len(windows) == len(documents[model]):
                if windows.sha256 not in same:
                    known = documents[model].astype(object)
                    names = list(known.where(known.notna(), None))
                    size = model_record(self.tables.provenance, model).vocabulary
                    same[windows.sha256] = unigram_losses(windows.tokens, names, vocabulary=size)
                losses[model] = pd.Series(same[windows.sha256], documents[model].index)
        return losses

    @cached_property
    def _one_loop(self) -> dict[Key, pd.Series]:
        """Loss when the coda reads h(1) as it is, by sample."""
        readout = self.tables.readout
        if readout is None:
            return {}
        first = readout[readout["t"].eq(1) & readout["reading"].eq("raw") & sound(readout)]
        deeper = {key for key, (K, _) in self.depth.items() if K > 1}
        return {
            key: rows.set_index("sample")["value"]
            for key, rows in by_key(first).items()
            if key in deeper
        }

    def _against(self, key: Key) -> Key | None:
        """The reference's checkpoint that another model's is held against."""
        if self.reference is None or key.model == self.reference:
            return None
        loops = {k.loop: k for k in self._by_key if k.model == self.reference}
        if not loops:
            return None
        loop = key.loop if key.loop in loops else next(iter(loops))
        steps = [k for k in self._by_key if (k.model, k.loop) == (self.reference, loop)]
        same = Key(self.reference, key.step, loop)
        return same if same in steps else max(steps, key=lambda k: k.step or 0)

    def _same_tokens(self, model: str, other: str) -> bool:
        windows = [self.windows.get(name) for name in (model, other)]
        return len({part.sha256 for part in windows if part is not None}) < 2

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Every checkpoint against the first model (`collapse.differences`)."""
        tokens = {name: windows.sha256 for name, windows in self.windows.items()}
        return differences(
            self.samples, tokens=tokens, depth=self.depth, skip=frozenset(self.added)
        )

    @cached_property
    def depth(self) -> dict[Key, tuple[int, int]]:
        """K, and the most iterations that were run, of each checkpoint and loop."""
        update, delta = self.tables.update, self.tables.delta
        assert update is not None
        run = {} if delta is None else {k: int(v["t"].max()) + 1 for k, v in by_key(delta).items()}
        depth = {}
        for key, rows in by_key(update).items():
            K = sum(block_number(str(block)) is not None for block in rows["block"].unique())
            depth[key] = (K, max(K, run.get(key, K)))
        return depth

    @property
    def cautions(self) -> list[str]:
        """What a reader should know before trusting verdicts and intervals, in sentences.

        Few or unknown documents, windows that repeat others; what the signs of a loop leave out
        since its first states have no spread.
        """
        sentences = cautions(self.samples)
        if self.tables.cka is None:
            return sentences
        for key, rows in by_key(self.tables.cka).items():
            if key in self._rows and (first := without_spread(rows, self.depth[key][0])):
                states = "h0" if first == 1 else f"h0 to h{first - 1}"
                sentences.append(
                    f"{self.label(key)}: all tokens are alike in {states}: CKA, rank ratio and "
                    f"slope are taken from h{first} on"
                )
        return sentences

    @property
    def same_tokens(self) -> bool:
        """Whether all models were measured on the same windows of tokens."""
        return len({windows.sha256 for windows in self.windows.values()}) < 2

    def label(self, key: Key) -> str:
        """Call a checkpoint in text.

        Args:
            key: Of the checkpoint and loop.

        Returns:
            Its model and, where they matter, step and loop.
        """
        return label(key, self._loops[key.model])

    @cached_property
    def _loops(self) -> dict[str, int]:
        """How many loops each model has."""
        pairs = {(key.model, key.loop) for key in self._rows}
        return Counter(model for model, _ in pairs)

    @cached_property
    def _rows(self) -> dict[Key, dict[Any, dict[Any, Any]]]:
        """The signs of each checkpoint and loop, by name."""
        groups = by_key(self.signs).items()
        return {key: rows.set_index("sign").to_dict("index") for key, rows in groups}

    def summary(self, *, command: str | None = None) -> dict[str, Any]:
        """The contents of `summary.json`.

        Args:
            command: The command line that made it.

        Returns:
            JSON values; numbers that are not finite are None.
        """
        first = next(iter(self.verdicts), None)
        value = {
            "format": FORMAT,
            "format_version": VERSION,
            "loopscope": __version__,
            "command": command,
            "samples": self._samples(),
            "reference": None if first is None else self.label(first),
            "measures": [_described(sign) for sign in SIGNS],
            "thresholds": self._thresholds(),
            "checkpoints": [self._checkpoint(key) for key in self.verdicts],
            "differences": self._differences(),
            "series": self._series(),
            "yardsticks": [_described(sign) for sign in YARDSTICKS],
            "failed": [{"target": t, "reason": reason} for t, reason in self.failed],
            "notes": [note for note in self.notes() if not note.startswith("not measured: ")],
        }
        return _plain(value)

    def _samples(self) -> dict[str, Any]:
        windows = list(self.windows.values())
        seeds = {part.options.get("seed") for part in windows}
        tokens = windows[0].tokens if windows else None
        return {
            "data": windows[0].source if windows else "",
            "count": max(map(len, windows), default=0),
            "documents": self._documents(),
            "tokens": 0 if tokens is None else tokens.shape[1],
            "seed": seeds.pop() if len(seeds) == 1 else None,
            "same_tokens": self.same_tokens,
        }

    def _documents(self) -> int | None:
        """How many documents the samples come from; None where nobody knows."""
        documents = self.samples.groupby("model")["document"].nunique()
        return int(documents.max()) or None

    def _thresholds(self) -> list[dict[str, Any]]:
        entries = []
        for threshold in THRESHOLDS:
            value = self.thresholds.get(threshold.name, threshold.value)
            entries.append(
                {
                    "name": threshold.name,
                    "measures": threshold.signs,
                    "value": value,
                    "unit": threshold.unit,
                    "meaning": threshold.meaning_at(value),
                }
            )
        return entries

    def _checkpoint(self, key: Key) -> dict[str, Any]:
        record = model_record(self.tables.provenance, key.model)
        target = record.target_at(key.step)
        return {
            "label": self.label(key),
            **key._asdict(),
            "target": str(target if target is not None else key.model),
            "variant": record.variant,
            "layout": record.layout,
            "K": self.depth[key][0],
            "T": self.depth[key][1],
            "untrained": record.untrained_at(key.step),
            "samples": len(self._by_key[key]),
            "measures": self._measures(key),
            "yardsticks": {
                name: {"mean": d.mean, "low": d.low, "high": d.high, "n": d.n}
                for name, d in self.yardsticks.get(key, {}).items()
            },
            "verdict": asdict(self.verdicts[key]),
        }

    def _measures(self, key: Key) -> dict[str, Any]:
        """Every sign of a checkpoint, with its difference to the untrained twin."""
        twin = self._twin(key)
        measures = {}
        for sign in SIGNS:
            row = self._rows[key][sign.name]
            against = None
            if twin is not None and key != twin[0]:
                twin_values = twin[1][sign.name]
                values = self._by_key[key][sign.name]
                d = paired_difference(values, twin_values, self._clusters[key])
                if d is not None:
                    mean = twin_values.mean()
                    against = {"mean": mean, "difference": d.mean, "low": d.low, "high": d.high}
            numbers = {name: row[name] for name in ("mean", "low", "high", "std")}
            counts = {name: int(row[name]) for name in ("n", "documents", "clusters", "n_flagged")}
            measures[sign.name] = {**numbers, **counts, "untrained": against}
        return measures

    @cached_property
    def _by_key(self) -> dict[Key, pd.DataFrame]:
        """The signs of every sample of each checkpoint and loop, by sample."""
        return {key: rows.set_index("sample") for key, rows in by_key(self.samples).items()}

    @cached_property
    def _clusters(self) -> dict[Key, Clusters]:
        """Which samples of each checkpoint and loop belong together."""
        return {key: clusters_of(rows) for key, rows in by_key(self.samples).items()}

    def _twin(self, key: Key) -> tuple[Key, pd.DataFrame] | None:
        """The untrained twin's same loop."""
        name = self.twins.get(key.model)
        twin = Key(name, None, key.loop) if name is not None else None
        return None if twin not in self._by_key else (twin, self._by_key[twin])

    def _differences(self) -> list[dict[str, Any]]:
        table, rows = self.differences, []
        names = (*KEYS, "sign", "against_step", "against_loop")
        kept = [column for column in table.columns if column not in names]
        for row in table.to_dict("records"):
            key = Key.of((row["model"], row["step"], row["loop"]))
            against = Key.of((self.reference, row["against_step"], row["against_loop"]))
            labels = {"label": self.label(key), "against": self.label(against)}
            numbers = {str(name): row[name] for name in kept}
            rows.append({**labels, "measure": row["sign"], **numbers})
        return rows

    def _series(self) -> list[dict[str, Any]]:
        runs: dict[tuple[str, str], dict[int, Verdict]] = {}
        for key, verdict in self.verdicts.items():
            if key.step is not None:
                runs.setdefault((key.model, key.loop), {})[key.step] = verdict
        entries = []
        for (model, loop), verdicts in runs.items():
            began = onset(verdicts)
            entries.append(
                {
                    "model": model,
                    "loop": loop,
                    "steps": sorted(verdicts),
                    "missing": self.missing.get(model, []),
                    "onset": None if began is None else began._asdict(),
                }
            )
        return entries


def _by_sample(documents: Sequence[pd.Series]) -> pd.Series:
    """The document of each sample, from those of the samples of each loop."""
    whole = pd.concat(list(documents))
    return whole[~whole.index.duplicated()].sort_index()


def _described(sign: Sign) -> dict[str, str]:
    names = ("name", "title", "unit", "range", "formula", "meaning")
    return {name: getattr(sign, name) for name in names}


def loopless(tables: Tables) -> list[str]:
    """Name the models that run no layers again with the same weights.

    Args:
        tables: What was measured; their provenance tells.

    Returns:
        Names in the tables, in order.
    """
    return [record.name for record in model_records(tables.provenance) if record.has_loop is False]


def _plain(value: Any) -> Any:
    """With JSON's own types; numbers that are not finite and nulls of pandas become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or value is pd.NA or isinstance(value, str | bool):
        return None if value is pd.NA else value
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
