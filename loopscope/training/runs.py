"""Training logs → the table `training`: which runs there are, what each trained, and its log."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from loopscope.analysis.tables.frames import RUNS, Tables
from loopscope.analysis.tables.training_curves import recipe
from loopscope.errors import InputError, unknown_name
from loopscope.models.native.configuration import LoopConfig
from loopscope.provenance import commit, versions
from loopscope.training.logs import COLUMNS as LOGGED
from loopscope.training.logs import LOG, RECIPE

RECORDS = ("provenance.json", RECIPE)
"""Where a run's recipe is: of a finished one, of one that is still going or was stopped."""

_COUNTS = ("step", "tokens")
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
        rows: Its log, columns `LOGGED`; NaN where no validation loss was taken.
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
    from loopscope.models.native.parameter_counts import ParameterCount, count_parameters
    from loopscope.models.opening.loading import zoo

    found = {path.resolve(): path for target in targets or zoo() for path in _find(str(target))}
    runs, notes = _chosen([read_run(folder) for folder in found.values()])
    if not runs:
        raise InputError(f"no run has a logged step yet ({'; '.join(notes)}); wait for one.")
    counts: dict[LoopConfig, ParameterCount] = {}
    parts = []
    for name, run in zip(_names([run.folder for run in runs]), runs, strict=True):
        if run.config not in counts:
            counts[run.config] = count_parameters(run.config)
        count = counts[run.config]
        told = {
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
            else pd.Series([told[column]] * len(run.rows))
            for column in RUNS["training"]
        }
        frame = pd.DataFrame(columns).astype(RUNS["training"])
        parts.append(Tables(training=frame, provenance={"models": {name: _provenance(run)}}))
    tables = Tables.concat(parts)
    tables.provenance["notes"] = notes
    return tables


def read_run(folder: Path) -> Run:
    """Read one run's recipe and log.

    Args:
        folder: Holds `log.csv` and `provenance.json` or `run.json`.

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
        raise InputError(f"{record} lacks training.model; {_AGAIN}")
    config = LoopConfig.from_dict(model, source=f"{record}, training.model")
    numbers = {}
    for name, least in (("steps", 1), ("seed", 0)):
        value = training.get(name)
        if type(value) is not int or value < least:
            raise InputError(
                f"{record}: training.{name} must be an integer of at least {least}, is {value!r}; "
                f"{_AGAIN}"
            )
        numbers[name] = value
    rows = read_log(folder / LOG, whole=record.name == RECORDS[0])
    if len(rows) and rows["step"].iloc[-1] > numbers["steps"]:
        raise InputError(
            f"{folder / LOG} goes to step {rows['step'].iloc[-1]}, but {record.name} plans "
            f"{numbers['steps']}: they are of different runs; {_AGAIN}"
        )
    return Run(folder=folder, origin=origin, config=config, rows=rows, **numbers)


_AGAIN = "copy the run's folder again, or leave it out."


def read_log(path: Path, *, whole: bool) -> pd.DataFrame:
    """Read a `log.csv`.

    Args:
        path: The file; a missing one has no rows.
        whole: Whether the training came to its end; otherwise a last line without its line break
            is what a killed process left, and is dropped.

    Returns:
        Columns `LOGGED`; `val_loss` is NaN where the file has none.

    Raises:
        InputError: for a file that cannot be read, or a line that is no row of a log.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; {_AGAIN}") from error
    *lines, last = text.split("\n")
    if last and whole:
        lines.append(last)
    header = lines[0].split(",") if lines else list(LOGGED)
    if missing := [name for name in LOGGED if name not in header]:
        raise InputError(f"{path}, line 1 names no column {', '.join(missing)}; {_AGAIN}")
    rows: list[dict[str, int | float]] = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split(",")
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {number} has {len(fields)} fields instead of {len(header)}; {_AGAIN}"
            )
        given = dict(zip(header, fields, strict=True))
        row = {name: _number(given[name], name, path, number) for name in LOGGED}
        if rows and not all(row[name] > rows[-1][name] for name in _COUNTS):
            raise InputError(
                f"{path}, line {number}: step and tokens must grow, step {row['step']:.0f} after "
                f"{rows[-1]['step']:.0f}; {_AGAIN}"
            )
        rows.append(row)
    types = {name: RUNS["training"][name] for name in LOGGED}
    return pd.DataFrame(rows, columns=list(LOGGED)).astype(types)


def _number(text: str, column: str, path: Path, line: int) -> int | float:
    if column == "val_loss" and not text:
        return math.nan
    whole = column in _COUNTS
    try:
        value: int | float = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value < 2**63 if whole else math.isfinite(value)):
        wanted = "a positive integer" if whole else "a finite number"
        raise InputError(f"{path}, line {line}: {column} must be {wanted}, is {text!r}; {_AGAIN}")
    return value


def _find(target: str) -> list[Path]:
    """The run folders that a target means."""
    from loopscope.models.opening.loading import UNTRAINED, zoo, zoo_folder

    if target.endswith(UNTRAINED):
        raise InputError(f"{target} is untrained, so it has no log; leave {UNTRAINED} out.")
    if target in zoo():
        return [zoo_folder() / target]
    folder = Path(target).expanduser()
    if folder.is_dir():
        if _is_run(folder):
            return [folder]
        if found := _search(folder):
            return found
        raise InputError(f"{folder} holds no training run{_lacks(folder)}; {_WHAT}.")
    if folder.exists():
        raise InputError(f"{folder} is a file; give the run's folder instead.")
    raise unknown_name(
        "run", target, zoo(), hint=f"No such folder either. Give a zoo name or a folder; {_WHAT}."
    )


def _search(folder: Path) -> list[Path]:
    """Runs below a folder, in the order in which a person counts; hidden folders are passed by."""
    found = []
    for path, below, _ in os.walk(folder):
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)
        if _is_run(Path(path)):
            found.append(Path(path))
            below.clear()
    return found


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
        raise InputError(f"{record} cannot be read as JSON: {error}; {_AGAIN}") from error
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
            better, other = best[key], run
            if run.rows["step"].iloc[-1] > better.rows["step"].iloc[-1]:
                better, other = run, better
            best[key] = better
            notes.append(
                f"left out: {other.folder} repeats recipe and seed {run.seed} of {better.folder}"
            )
    kept = {id(run) for run in best.values()}
    return [run for run in runs if id(run) in kept], notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many of its parents as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        clash = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not clash:
            return names
        for i in clash:
            depth[i] += 1


def _natural(name: str) -> list[tuple[str, int]]:
    """Sort key under which `s10` comes after `s2`."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


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


__all__ = ["LOGGED", "Run", "read_log", "read_run", "read_runs", "recipe"]
