"""What the tables' provenance tells of one model: its kind, its loops, how it was made.

`Tables.provenance["models"]` holds a record for each model, of JSON values. This is where such a
record is read; it needs neither torch nor the model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loopscope.errors import InputError
from loopscope.models.native import Layout
from loopscope.names import is_twin_name


@dataclass(frozen=True)
class ModelRecord:
    """One model's part of the provenance. A record that tells nothing is an empty one.

    Attributes:
        name: The model's name in the tables.
        values: JSON values by key: `config`, `map` (of a foreign model: its loops), `training`
            (where its weights come from), `options` and `samples` (how it was measured), and
            what a comparison adds: `target`, `steps`, `twin_of`.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether it is somebody else's model, whose loops were found in it."""
        return "map" in self.values

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration; empty where nothing tells it."""
        config = self.values.get("config")
        return config if isinstance(config, Mapping) else {}

    @property
    def options(self) -> Mapping[str, Any]:
        """How it was measured (`options.Options`); empty where nothing tells."""
        return self.values.get("options") or {}

    @property
    def training(self) -> Mapping[str, Any]:
        """Where its weights come from, of a series those of the first step; empty if unknown."""
        return self.values.get("training") or {}

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids; None where nothing tells."""
        return self.config.get("d_vocab")

    def directions(self, loop: str) -> float:
        """Tell the highest effective rank that h(K) can have, min(L, D).

        Args:
            loop: The loop.

        Returns:
            The smaller of its positions and width; NaN where nothing tells them.
        """
        width = self.config.get("d_model")
        tokens = (self.values.get("samples") or {}).get("tokens")
        shape = (self.values.get("states") or {}).get(loop)
        if shape is not None:
            return float(min(shape)) if all(shape) else math.nan
        left = (tokens or 0) - self.options.get("drop_first", 0)
        return float(min(width, left)) if width and tokens else math.nan

    @property
    def variant(self) -> str | None:
        """The variant of a native model; None for a foreign one."""
        return None if self.foreign else self.config.get("variant")

    @property
    def layout(self) -> str:
        """The layout of a native model, or the loops of a foreign one; empty where unknown."""
        if not self.foreign:
            return str(self.config.get("layout", ""))
        return str(self._map.get("layout") or self.config.get("architecture") or "")

    @property
    def has_loop(self) -> bool | None:
        """Whether it runs layers again with the same weights; None where nothing tells."""
        if self.foreign:
            return bool(self._map.get("loops"))
        if "layout" not in self.config:
            return None
        try:
            return Layout.parse(self.config["layout"]).shared
        except InputError:
            return False

    @property
    def untrained(self) -> bool:
        """Whether it was never trained: its name ends in `@init`, or its weights are fresh ones."""
        return is_twin_name(self.name) or self.training.get("untrained") is True

    def untrained_at(self, step: int | None) -> bool:
        """Tell whether a checkpoint was never trained.

        Args:
            step: Its training step; None outside a series.

        Returns:
            As `untrained`; of a series only for its first step, whose training the record tells.
        """
        first = step is None or step == min(self.steps, default=step)
        return self.untrained and first

    def paths(self, loop: str) -> tuple[str, ...]:
        """Tell where the iterations of a foreign model's loop stand.

        Args:
            loop: Its name.

        Returns:
            A path for each iteration, such as H0.L1; empty where it is their number, or unknown.
        """
        entries = {
            name: entry
            for entry in self._map.get("loops") or []
            for name in (
                entry.get("name"),
                *(f"{entry.get('name')}.{state}" for state in entry.get("states") or []),
            )
        }
        paths = entries.get(loop, {}).get("paths") or []
        return () if all(path.isdigit() for path in paths) else tuple(paths)

    def loops(self, loop: str) -> int | None:
        """Tell how many iterations of a loop the model runs by itself.

        Args:
            loop: Its name, or that of one of its states, or of a group of samples
                (`core[K=3]`).

        Returns:
            K; None where nothing tells it.
        """
        if of_group := re.fullmatch(r".*\[K=(\d+)\]", loop):
            return int(of_group[1])
        if not self.foreign:
            try:
                return Layout.parse(self.layout).K or None
            except InputError:
                return None
        counts = {entry["name"]: entry["K"] for entry in self._map.get("loops") or []}
        return counts.get(loop, counts.get(loop.rpartition(".")[0]))

    @property
    def target(self) -> str | None:
        """What was given to load it, of a series its first step; None where it was in memory."""
        return self.values.get("target")

    @property
    def steps(self) -> dict[int, Mapping[str, Any]]:
        """Of a series, what is known of each step (`target`, `stamp`), by its number."""
        return {int(step): facts for step, facts in (self.values.get("steps") or {}).items()}

    def target_at(self, step: int | None) -> str | None:
        """Tell what was given to load a checkpoint.

        Args:
            step: Its training step; None outside a series.

        Returns:
            The target; `target` for a step of which nothing is known.
        """
        return self.target if step is None else self.steps.get(step, {}).get("target", self.target)

    @property
    def twin_of(self) -> tuple[str, ...]:
        """The models that it was added to as their untrained twin; empty for a named model."""
        return tuple(self.values.get("twin_of") or ())

    @property
    def _map(self) -> Mapping[str, Any]:
        return self.values.get("map") or {}


def model_record(provenance: Mapping[str, Any], model: str) -> ModelRecord:
    """Read the record of one model.

    Args:
        provenance: Of the tables.
        model: Its name in the tables.

    Returns:
        The record; an empty one where nothing is known of the model.
    """
    return ModelRecord(model, (provenance.get("models") or {}).get(model) or {})


def model_records(provenance: Mapping[str, Any]) -> list[ModelRecord]:
    """Read the records of all models.

    Args:
        provenance: Of the tables.

    Returns:
        The records, in the order of the tables.
    """
    return [model_record(provenance, model) for model in provenance.get("models") or {}]


__all__ = ["ModelRecord", "model_record", "model_records"]
