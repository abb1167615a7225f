"""Which training runs a figure draws as one, and how such a group is called and looks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from loopscope.analysis.tables import Tables, model_record, recipe
from loopscope.errors import InputError, unknown_name
from loopscope.figures.names import variant_label
from loopscope.figures.panels import need
from loopscope.figures.style import variant_look, variant_rank

_NAMES = {
    "model.d_model": "D",
    "model.d_vocab": "vocabulary",
    "model.slots": "B",
    "batch_size": "batch",
    "data": "text",
}
TEXT = {"data", "heldout_share", "model.d_vocab"}
"""Settings that say what was trained and validated on; losses compare where they are equal."""

_MANY = 2


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        recipe: What they have in common, hashed.
        variant: The recurrence.
        layout: Layout string.
        K: Core iterations.
        d_model: Width.
        slots: Memory slots, None without a memory.
        settings: The recipe, setting → value; its hash alone where the tables do not tell.
    """

    recipe: str
    variant: str
    layout: str
    K: int
    d_model: int
    slots: int | None
    settings: Mapping[str, Any]

    @property
    def shared(self) -> bool:
        """Whether the iterations share their layers."""
        return "R" in self.layout

    @property
    def name(self) -> str:
        """The variant as figures show it."""
        return variant_label(self.variant, shared=self.shared or not self.K)


def run_groups(
    tables: Tables, models: Sequence[str] | str | None = None
) -> tuple[pd.DataFrame, list[Group]]:
    """Choose runs and group them.

    Args:
        tables: Needs `training`.
        models: Names of runs; None takes all.

    Returns:
        Their rows, and the groups in the table's order.

    Raises:
        UnknownNameError: if a run is not in the table.
        InputError: if the table is missing or no run is asked for.
    """
    frame = need(tables, "training")
    held = [str(m) for m in frame["model"].unique()]
    runs = held if models is None else [models] if isinstance(models, str) else list(models)
    if not runs:
        raise InputError(f"no run was asked for; the table 'training' holds: {', '.join(held)}.")
    for run in runs:
        if run not in held:
            hint = f"The table 'training' holds: {', '.join(held)}."
            raise unknown_name("run", run, held, hint=hint)
    frame = frame[frame["model"].isin(runs)]
    by_recipe = frame.groupby(frame["recipe"].astype(str), sort=False)
    return frame, [_group(tables, str(key), rows.iloc[0]) for key, rows in by_recipe]


def _group(tables: Tables, key: str, first: pd.Series) -> Group:
    """The group of a recipe, from the first row of any of its runs."""
    return Group(
        recipe=key,
        variant=str(first["variant"]),
        layout=str(first["layout"]),
        K=int(first["K"]),
        d_model=int(first["d_model"]),
        slots=None if pd.isna(first["slots"]) else int(first["slots"]),
        settings=_settings(tables, str(first["model"]), key),
    )


def group_labels(groups: Sequence[Group], *, rule: bool = False) -> dict[str, str]:
    """Name groups: the variant, its slots where they differ, and what else tells two apart.

    One name stands for one variant in all layouts and widths. Settings are written where two
    groups of a name have the same layout and width, or another text or vocabulary.

    Args:
        groups: The groups of the figure.
        rule: Take slots that follow the paper's rule, B = K + 3, for the same in all layouts.

    Returns:
        recipe → label.
    """
    several = len({g.slots for g in groups if g.slots}) > 1
    ruled = {g.slots for g in groups if g.slots == g.K + 3}
    base = {}
    for g in groups:
        follows = rule and g.slots == g.K + 3 and len(ruled) > 1
        slots = "K+3" if follows else g.slots
        base[g.recipe] = g.name + (f", B={slots}" if several and g.slots else "")
    labels: dict[str, str] = {}
    for name in dict.fromkeys(base.values()):
        same = [g for g in groups if base[g.recipe] == name]
        keys = differing(same) & TEXT
        for place in {(g.layout, g.d_model) for g in same}:
            keys |= differing([g for g in same if (g.layout, g.d_model) == place])
        labels |= {g.recipe: name + _suffix(g, keys) for g in same}
    return labels


def looks(groups: Sequence[Group], labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Give each label its line, in the order of a legend: vanilla, base, the supplements, mesh.

    Args:
        groups: The groups of the figure.
        labels: recipe → label.

    Returns:
        label → keywords of `Axes.plot`.
    """
    look_of: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}

    def place(g: Group) -> tuple[int, bool, int, str]:
        return variant_rank(g.variant), not g.shared, g.slots or 0, labels[g.recipe]

    for g in sorted(groups, key=place):
        label = labels[g.recipe]
        if label not in look_of:
            number = used.get(g.variant, 0)
            used[g.variant] = number + 1
            look_of[label] = variant_look(g.variant, number)
    return look_of


def differing(groups: Sequence[Group]) -> set[str]:
    """Settings in which groups differ.

    Args:
        groups: Any number of groups.

    Returns:
        Names of settings.
    """
    names = {name for g in groups for name in g.settings}
    return {n for n in names if len({json.dumps(g.settings.get(n)) for g in groups}) > 1}


def setting_name(setting: str) -> str:
    """Write the name of a setting: `model.d_model` becomes D.

    Args:
        setting: Its name in a recipe.

    Returns:
        The short name.
    """
    return _NAMES.get(setting, setting.removeprefix("model.").replace("_", " "))


def settings_note(groups: Sequence[Group]) -> str:
    """Tell how the runs differ besides their models: those differences are in what is compared.

    Args:
        groups: What is drawn.

    Returns:
        Sentences, empty where all were trained in the same way on the same text.
    """
    differ = differing(groups)
    names = sorted(n for n in differ - TEXT - {"recipe"} if not n.startswith("model."))
    sentences = [f"Runs differ in {', '.join(map(setting_name, names))}."] if names else []
    if differ & TEXT:
        sentences.append("Runs differ in text or vocabulary: their losses do not compare.")
    return " ".join(sentences)


def _settings(tables: Tables, model: str, key: str) -> dict[str, Any]:
    origin = model_record(tables.provenance, model).training
    return recipe(origin) if "training" in origin else {"recipe": key}


def _suffix(group: Group, settings: Iterable[str]) -> str:
    parts = [f"{setting_name(s)}={_value(group.settings.get(s))}" for s in sorted(settings)]
    if len(parts) > _MANY:
        parts = [f"recipe {group.recipe}"]
    return "".join(f", {part}" for part in parts)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and len(value) == 64:  # a SHA-256
        return value[:6]
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
