"""Training logs → the table `training`: which runs there are, what each trained, and its log."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from loopscope.analysis.tables import RUNS, Tables, recipe
from loopscope.errors import InputError, unknown_name
from loopscope.models.native import LoopConfig
from loopscope.names import UNTRAINED, distinct_labels, natural_key
from loopscope.provenance import commit, versions
from loopscope.training.logs import AGAIN, LOG, RECIPE, read_log

if TYPE_CHECKING:
    from loopscope.models.native import ParameterCount

RECORDS = ("provenance.json", RECIPE)
"""Where a run's recipe is: of a finished one, of one that is still going or was stopped."""

_WHAT = (
    f"a run is a folder with {LOG} and {RECORDS[0]} (or {RECORDS[1]} while it is trained), as "
    "`loopscope train` writes it"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run as its folder tells it.

    Attributes:
        folder: Where it is.
        origin: Its `provenance.json` or `run.json`; `origin["training"]` is the recipe.
        config: What was trained.
        seed: Seed of the initial weights.
        steps: Optimiser steps planned.
        rows: Its log, the columns of `log.csv`; NaN where no validation loss was taken.
    """

    folder: Path
    origin: dict[str, Any]
    config: LoopConfig
    seed: int
    steps: int
    rows: pd.DataFrame

    @property
    def recipe(self) -> str:
        """Eight digits that equal those of a run that differs in nothing but its seed."""
        text = json.dumps(recipe(self.origin), sort_keys=True)
        return sha256(text.encode()).hexdigest()[:8]


def read_runs(targets: Sequence[str | os.PathLike[str]] = ()) -> Tables:
    """Read training logs into the table `training`; no model is run.

    Args:
        targets: Zoo names, run folders, or folders that are searched for runs (subfolders of a run
            are not searched). The whole zoo when none are given.

    Returns:
        Tables with `training` alone, one row per logged step. Its models are the runs, named by
        their folders with as much of the path as tells them apart; the provenance of each has its
        folder, its recipe and the hash of its text. `provenance["notes"]` names the runs that were
        left out: those without a logged step yet, and repetitions of a recipe and seed (the run
        that came further is taken).

    Raises:
        InputError: where there is no run, or a log or recipe cannot be read.
    """
    from loopscope.models.native import count_parameters
    from loopscope.models.opening import zoo

    folders = {path.resolve(): path for target in targets or zoo() for path in _find(str(target))}
    runs, notes = _chosen([read_run(folder) for folder in folders.values()])
    if not runs:
        raise InputError(f"no run has a logged step yet ({'; '.join(notes)}); wait for one.")
    counts: dict[LoopConfig, "ParameterCount"] = {}
    parts = []
    names = distinct_labels([_paths_from_the_end(run.folder) for run in runs])
    for name, run in zip(names, runs, strict=True):
        if run.config not in counts:
            counts[run.config] = count_parameters(run.config)
        frame = _frame(name, run, counts[run.config])
        parts.append(Tables(training=frame, provenance={"models": {name: _provenance(run)}}))
    tables = Tables.concat(parts)
    tables.provenance["notes"] = notes
    return tables


def _frame(name: str, run: Run, count: "ParameterCount") -> pd.DataFrame:
    """A run's rows of the table `training`."""
    constants = {
        "model": name,
        "variant": run.config.variant,
        "layout": str(run.config.layout),
        "slots": run.config.slots,
        "seed": run.seed,
        "recipe": run.recipe,
        "K": run.config.K,
        "d_model": run.config.d_model,
        "params_total": count.total,
        "params_non_embedding": count.non_embedding,
        "steps_planned": run.steps,
    }
    columns = {
        column: run.rows[column]
        if column in run.rows
        else pd.Series([constants[column]] * len(run.rows))
        for column in RUNS["training"]
    }
    return pd.DataFrame(columns).astype(RUNS["training"])


def read_run(folder: Path) -> Run:
    """Read one run's recipe and log.

    Args:
        folder: Holds `log.csv` and `provenance.json` or `run.json`.

    Returns:
        The run; one that has not logged a step yet has no rows.

    Raises:
        InputError: saying what cannot be read, where, and what to do.
    """
    record = _record(folder)
    origin = _origin(record) if record else None
    if record is None or origin is None:
        raise InputError(
            f"{folder} holds no recipe of a training ({' or '.join(RECORDS)} with an object "
            f"'training'); {_WHAT}."
        )
    training = origin["training"]
    model = training.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{record} lacks training.model; {AGAIN}")
    config = LoopConfig.from_dict(model, source=f"{record}, training.model")
    numbers = {
        name: _whole_number(training.get(name), name, least, record)
        for name, least in (("steps", 1), ("seed", 0))
    }
    rows = read_log(folder / LOG, whole=record.name == RECORDS[0])
    if len(rows) and rows["step"].iloc[-1] > numbers["steps"]:
        raise InputError(
            f"{folder / LOG} goes to step {rows['step'].iloc[-1]}, but {record.name} plans "
            f"{numbers['steps']}: they are of different runs; {AGAIN}"
        )
    return Run(folder=folder, origin=origin, config=config, rows=rows, **numbers)


def _whole_number(value: Any, name: str, least: int, record: Path) -> int:
    if type(value) is not int or value < least:
        raise InputError(
            f"{record}: training.{name} must be an integer of at least {least}, is {value!r}; "
            f"{AGAIN}"
        )
    return value


def _find(target: str) -> list[Path]:
    """The run folders that a target means."""
    from loopscope.models.opening import zoo, zoo_folder

    if target.endswith(UNTRAINED):
        raise InputError(f"{target} is untrained, so it has no log; leave {UNTRAINED} out.")
    if target in zoo():
        return [zoo_folder() / target]
    folder = Path(target).expanduser()
    if folder.is_dir():
        if _is_run(folder):
            return [folder]
        if folders := _search(folder):
            return folders
        raise InputError(f"{folder} holds no training run{_lacks(folder)}; {_WHAT}.")
    if folder.exists():
        raise InputError(f"{folder} is a file; give the run's folder instead.")
    raise unknown_name(
        "run", target, zoo(), hint=f"No such folder either. Give a zoo name or a folder; {_WHAT}."
    )


def _search(folder: Path) -> list[Path]:
    """Runs below a folder, in the order in which a person counts; hidden folders are passed by."""
    folders = []
    for path, below, _ in os.walk(folder):
        below[:] = sorted((name for name in below if not name.startswith(".")), key=natural_key)
        if _is_run(Path(path)):
            folders.append(Path(path))
            below.clear()
    return folders


def _is_run(folder: Path) -> bool:
    """Whether there is a recipe, and a log or the record of a training that has none yet."""
    record = _record(folder)
    if record is None or not ((folder / LOG).is_file() or record.name == RECORDS[1]):
        return False
    return _origin(record) is not None


def _record(folder: Path) -> Path | None:
    return next((folder / name for name in RECORDS if (folder / name).is_file()), None)


def _origin(record: Path) -> dict[str, Any] | None:
    """What the record says; None where it records something other than a training."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{record} cannot be read as JSON: {error}; {AGAIN}") from error
    training = values.get("training") if isinstance(values, dict) else None
    return values if isinstance(training, dict) else None


def _lacks(folder: Path) -> str:
    """What a folder that looks like a run lacks."""
    has_log, record = (folder / LOG).is_file(), _record(folder)
    if has_log and record is None:
        return f" (it has {LOG}, but no {' or '.join(RECORDS)})"
    if has_log:
        return f" (its {record.name if record else ''} has no object 'training')"
    return f" (it is a checkpoint without {LOG})" if (folder / "config.json").is_file() else ""


def _chosen(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs with rows, one per recipe and seed; and what was left out."""
    notes: list[str] = []
    best: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = (run.recipe, run.seed)
        if not len(run.rows):
            notes.append(f"left out: {run.folder} has no logged step yet")
        elif key not in best:
            best[key] = run
        else:
            better, worse = best[key], run
            if run.rows["step"].iloc[-1] > better.rows["step"].iloc[-1]:
                better, worse = run, better
            best[key] = better
            notes.append(
                f"left out: {worse.folder} repeats recipe and seed {run.seed} of {better.folder}"
            )
    kept = {id(run) for run in best.values()}
    return [run for run in runs if id(run) in kept], notes


def _paths_from_the_end(folder: Path) -> list[str]:
    """What a folder may be called: its name, with more and more of its parents."""
    parts = folder.resolve().parts
    return ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]


def _provenance(run: Run) -> dict[str, Any]:
    """Where one run's rows come from, laid out as that of a measured model."""
    return {
        "config": run.config.to_dict(),
        "training": run.origin,
        "folder": str(run.folder),
        "versions": versions(),
        "commit": commit(),
        "notes": [],
    }


__all__ = ["Run", "read_run", "read_runs", "recipe"]
