"""Summary: what a comparison found, as one JSON value (`summary.json`, see docs/SUMMARY.md)."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from loopscope import __version__
from loopscope.analysis.collapse import (
    SIGNS,
    THRESHOLDS,
    Sign,
    Verdict,
    differences,
    judge,
    per_sample,
)
from loopscope.analysis.collapse.sign_values import Key, by_key
from loopscope.analysis.collapse.statistics import paired_difference, summarised
from loopscope.analysis.collapse.verdicts import label, onset
from loopscope.analysis.comparisons.result import Comparison
from loopscope.errors import InputError
from loopscope.models.native.configuration import Layout

FORMAT, VERSION = "loopscope-summary", 1


class Findings:
    """Everything that follows from a comparison: signs, differences, verdicts, series.

    Each is computed when it is first asked for.
    """

    def __init__(
        self, comparison: Comparison, *, thresholds: Mapping[str, float] | None = None
    ) -> None:
        """Take a comparison.

        Args:
            comparison: What `compare` gave.
            thresholds: Other values for some of `collapse.THRESHOLDS`, by name.
        """
        self.comparison = comparison
        self.thresholds = dict(thresholds or {})

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The signs of every sample (`collapse.per_sample`)."""
        return per_sample(self.comparison.tables)

    @cached_property
    def signs(self) -> pd.DataFrame:
        """Mean and interval of each sign (`collapse.signs`)."""
        return summarised(self.samples, self.comparison.tables)

    @cached_property
    def verdicts(self) -> dict[Key, Verdict]:
        """The verdict on every checkpoint and loop that the user named."""
        own = self.signs[~self.signs["model"].isin(self.comparison.added)]
        return judge(own, thresholds=self.thresholds, loopless=loopless(self.comparison))

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Every checkpoint against the first model (`collapse.differences`)."""
        found = self.comparison
        tokens = {name: one.sha256 for name, one in found.samples.items()}
        added = frozenset(found.added)
        return differences(self.samples, tokens=tokens, depth=self.depth, skip=added)

    @cached_property
    def depth(self) -> dict[Key, tuple[int, int]]:
        """K, and the most iterations that were run, of each checkpoint and loop."""
        update, delta = self.comparison.tables.update, self.comparison.tables.delta
        assert update is not None
        run = {} if delta is None else {k: int(v["t"].max()) + 1 for k, v in by_key(delta).items()}
        found = {}
        for key, rows in by_key(update).items():
            K = sum(str(block).startswith("core") for block in rows["block"].unique())
            found[key] = (K, max(K, run.get(key, K)))
        return found

    @property
    def same_tokens(self) -> bool:
        """Whether all models were measured on the same windows of tokens."""
        return len({one.sha256 for one in self.comparison.samples.values()}) < 2

    def label(self, key: Key) -> str:
        """How a checkpoint is called in text."""
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
        found = self.comparison
        limits = {one.name: self.thresholds.get(one.name, one.value) for one in THRESHOLDS}
        told = [
            {
                "name": one.name, "measures": one.signs, "value": limits[one.name],
                "unit": one.unit, "meaning": one.meaning,
            }
            for one in THRESHOLDS
        ]  # fmt: skip
        first = next(iter(self.verdicts), None)
        value = {
            "format": FORMAT,
            "format_version": VERSION,
            "loopscope": __version__,
            "command": command,
            "samples": self._samples(),
            "reference": None if first is None else self.label(first),
            "measures": [_told(sign) for sign in SIGNS],
            "thresholds": told,
            "checkpoints": [self._checkpoint(key) for key in self.verdicts],
            "differences": self._differences(),
            "series": self._series(),
            "failed": [{"target": t, "reason": reason} for t, reason in found.failed],
            "notes": [note for note in found.notes if not note.startswith("not measured: ")],
        }
        return _plain(value)

    def _samples(self) -> dict[str, Any]:
        samples = list(self.comparison.samples.values())
        seeds = {one.options.get("seed") for one in samples}
        return {
            "data": samples[0].source if samples else "",
            "count": max((len(one) for one in samples), default=0),
            "tokens": samples[0].tokens.shape[1] if samples else 0,
            "seed": seeds.pop() if len(seeds) == 1 else None,
            "same_tokens": self.same_tokens,
        }

    def _checkpoint(self, key: Key) -> dict[str, Any]:
        told = self.comparison.tables.provenance["models"][key.model]
        config = told.get("config") or {}
        twin = self._twin(key)
        own = self._by_key[key]
        measures = {}
        for sign in SIGNS:
            row = self._rows[key][sign.name]
            against = None
            if twin is not None and key != twin[0]:
                d = paired_difference(own[sign.name], twin[1][sign.name])
                mean = twin[1][sign.name].mean()
                if d is not None:
                    against = {"mean": mean, "difference": d.mean, "low": d.low, "high": d.high}
            numbers = {name: row[name] for name in ("mean", "low", "high", "std")}
            counts = {name: int(row[name]) for name in ("n", "n_flagged")}
            measures[sign.name] = {**numbers, **counts, "untrained": against}
        verdict = self.verdicts[key]
        target = told.get("target")
        if key.step is not None:
            target = told.get("steps", {}).get(str(key.step), {}).get("target", target)
        return {
            "label": self.label(key),
            **key._asdict(),
            "target": str(target if target is not None else key.model),
            "variant": config.get("variant") if "map" not in told else None,
            "layout": _layout(told),
            "K": self.depth[key][0],
            "T": self.depth[key][1],
            "untrained": key.model.endswith("@init"),
            "samples": len(own),
            "measures": measures,
            "verdict": asdict(verdict),
        }

    @cached_property
    def _by_key(self) -> dict[Key, pd.DataFrame]:
        return {key: rows.set_index("sample") for key, rows in by_key(self.samples).items()}

    def _twin(self, key: Key) -> tuple[Key, pd.DataFrame] | None:
        """The untrained twin's same loop."""
        name = self.comparison.twins.get(key.model)
        there = Key(name, None, key.loop) if name is not None else None
        return None if there not in self._by_key else (there, self._by_key[there])

    def _differences(self) -> list[dict[str, Any]]:
        table, rows = self.differences, []
        names = ("model", "step", "loop", "sign", "against_step", "against_loop")
        kept = [column for column in table.columns if column not in names]
        reference = self.comparison.reference
        for row in table.to_dict("records"):
            key = Key.of((row["model"], row["step"], row["loop"]))
            other = Key.of((reference, row["against_step"], row["against_loop"]))
            told = {"label": self.label(key), "against": self.label(other), "measure": row["sign"]}
            rows.append({**told, **{str(name): row[name] for name in kept}})
        return rows

    def _series(self) -> list[dict[str, Any]]:
        runs: dict[tuple[str, str], dict[int, Verdict]] = {}
        for key, verdict in self.verdicts.items():
            if key.step is not None:
                runs.setdefault((key.model, key.loop), {})[key.step] = verdict
        found = []
        for (model, loop), verdicts in runs.items():
            began = onset(verdicts)
            found.append(
                {
                    "model": model,
                    "loop": loop,
                    "steps": sorted(verdicts),
                    "missing": self.comparison.missing.get(model, []),
                    "onset": None if began is None else began._asdict(),
                }
            )
        return found


def _told(sign: Sign) -> dict[str, str]:
    names = ("name", "title", "unit", "range", "formula", "meaning")
    return {name: getattr(sign, name) for name in names}


def loopless(comparison: Comparison) -> list[str]:
    """Models that run no layers again with the same weights."""
    found = []
    for name, told in comparison.tables.provenance["models"].items():
        config = told.get("config") or {}
        if "map" in told:
            if not told["map"].get("loops"):
                found.append(name)
        elif "layout" in config and not _shared(config["layout"]):
            found.append(name)
    return found


def _shared(layout: str) -> bool:
    try:
        return Layout.parse(layout).shared
    except InputError:
        return False


def _layout(told: Mapping[str, Any]) -> str:
    """The layout of a native model, or the loops of another."""
    config = told.get("config") or {}
    if "map" not in told:
        return str(config.get("layout", ""))
    return str(told["map"].get("layout") or config.get("architecture") or "")


def _plain(value: Any) -> Any:
    """With JSON's own types; numbers that are not finite and nulls of pandas become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or value is pd.NA or isinstance(value, str | bool):
        return None if value is pd.NA else value
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
