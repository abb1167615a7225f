"""Targets: what is compared. Checkpoints, series of steps, and their untrained twins."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import glob, has_magic
from itertools import pairwise
from pathlib import Path
from typing import Any

from loopscope.errors import InputError
from loopscope.models.hooked import Hooked
from loopscope.models.native.configuration import LoopConfig
from loopscope.models.opening.loading import peek
from loopscope.models.opening.targets import Target, locate, zoo
from loopscope.names import distinct_labels, is_twin_name, natural_key, twin_name

STEP = re.compile(r"((?:step|checkpoint|ckpt|iter|epoch)[-_.=]?)(\d+)", re.IGNORECASE)
"""Names of the folders of a series: what they have in common, and the number of the step."""

_KIN = ("config.json", "loopscope.toml", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.py")
_NOT_KIN = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model at one moment of its training.

    Attributes:
        target: What `load` takes, or a model in memory.
        model: Its name in the tables; the run's, in a series.
        step: The training step, in a series.
        plain: Whether it has no loop; None where that shows only when it is loaded.
        foreign: Whether it is a foreign model that is still to be loaded.
        twin_of: The models whose untrained twin it is; empty for what the user named.
        kin: Equal for checkpoints that have the same untrained twin; None without one.
        untrained: Whether it is an untrained twin itself.
    """

    target: Any
    model: str
    step: int | None = None
    plain: bool | None = None
    foreign: bool = False
    twin_of: tuple[str, ...] = ()
    kin: Hashable = None
    untrained: bool = False

    @property
    def label(self) -> str:
        """How it is called where its step matters."""
        return self.model if self.step is None else f"{self.model}, step {self.step}"

    @property
    def named(self) -> bool:
        """Whether it is still to be loaded."""
        return _is_named(self.target)


@dataclass(kw_only=True)
class Plan:
    """What a comparison goes through.

    Attributes:
        checkpoints: In the order of the tables: as given, the steps of a series by their number,
            then the untrained twins.
        failed: Steps that cannot be read, with the reason.
        missing: Steps that a series leaves out, by its name.
        twins: The untrained twin's name, by model.
        notes: Why a model has no twin, and such.
    """

    checkpoints: list[Checkpoint]
    failed: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Names in the tables, in order."""
        return list(dict.fromkeys(one.model for one in self.checkpoints))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A target before it is looked into; of a series it knows its run and step."""

    target: Any
    run: Path | None = None
    prefix: str = ""
    step: int | None = None

    @property
    def series(self) -> Hashable:
        return None if self.run is None else (self.run.resolve(), self.prefix.lower())


def look_up(
    targets: Sequence[Any], *, trust_remote_code: bool = False, series: bool = True
) -> Plan:
    """Find all targets, without reading a weight.

    A series is a pattern (`run/step-*`), a folder without `config.json` whose subfolders are called
    step-100, checkpoint-100 or the like, or two or more such folders side by side. It is one model
    with several steps.

    Args:
        targets: Whatever `load` takes, patterns, folders of steps, or models in memory.
        trust_remote_code: As in `load`.
        series: Whether steps are one model; otherwise each is a model of its own.

    Returns:
        The checkpoints, none of them a twin that the user did not name.

    Raises:
        InputError: if there are none, a target does not exist, or one is given twice. A step of a
            series that cannot be read is in `failed` instead.
    """
    if not targets:
        raise InputError("no models given; name at least one.")
    found = [one for target in targets for one in _expanded(target)]
    found = _side_by_side(found) if series else [_Found(target=one.target) for one in found]
    groups: dict[Hashable, list[_Found]] = {}
    for number, one in enumerate(found):
        groups.setdefault(one.series or number, []).append(one)
    plan = Plan(checkpoints=[])
    named: list[tuple[str, str, str]] = []
    members: list[list[Checkpoint]] = []
    steps: list[list[int]] = []
    for group in groups.values():
        first = group[0]
        if first.run is None:
            single = _looked_into(first.target, trust_remote_code)
            full = str(first.target) if single.named else single.model
            named.append((single.model, full, full))
            members.append([single])
            steps.append([])
        else:
            full = str(first.run)
            named.append((first.run.resolve().name, full, f"{full}/{first.prefix}*"))
            members.append(_members(group, plan.failed, trust_remote_code))
            steps.append([one.step for one in group if one.step is not None])
    for label, group_found, there in zip(_labels(named), members, steps, strict=True):
        plan.checkpoints += [replace(one, model=label) for one in group_found]
        if gap := missing_steps(there):
            plan.missing[label] = gap
    if not plan.checkpoints:
        reasons = "; ".join(f"{target}: {reason}" for target, reason in plan.failed)
        raise InputError(f"none of the steps can be read: {reasons}")
    return plan


def missing_steps(steps: Sequence[int]) -> list[int]:
    """Steps that an otherwise regular series leaves out.

    Args:
        steps: Numbers of the steps that there are.

    Returns:
        The numbers in gaps that are multiples of the usual distance; empty where fewer than three
        steps or no more than half of the distances are equal.
    """
    there = sorted(set(steps))
    gaps = [b - a for a, b in pairwise(there)]
    usual, count = Counter(gaps).most_common(1)[0] if gaps else (0, 0)
    if count < 2 or 2 * count <= len(gaps):
        return []
    return [
        step
        for a, b in pairwise(there)
        if (b - a) % usual == 0
        for step in range(a + usual, b, usual)
    ]


def with_twins(plan: Plan, *, seed: int) -> Plan:
    """Add the untrained twin of each distinct configuration, where the user named none.

    Args:
        plan: Its checkpoints.
        seed: Of the weights of models in memory; targets take it when they are loaded.

    Returns:
        The same plan with twins at the end of its checkpoints.
    """
    named: dict[Hashable, str] = {}
    for one in plan.checkpoints:
        if one.untrained and one.kin is not None:
            named.setdefault(one.kin, one.model)
    made: dict[Hashable, Checkpoint] = {}
    taken, twins = set(plan.models), dict(plan.twins)
    for one in plan.checkpoints:
        if one.untrained or one.model in twins:
            continue
        if one.kin is None:
            plan.notes.append(f"{one.model}: no untrained twin: {_no_twin(one)}")
            continue
        if one.kin in named:
            twins[one.model] = named[one.kin]
            continue
        if one.kin not in made:
            label = twin_name(one.model)
            if label in taken:
                label = twin_name(str(one.target))
            target = twin_name(str(one.target)) if one.named else one.target.untrained(seed)
            made[one.kin] = replace(one, target=target, model=label, step=None, untrained=True)
        twins[one.model] = made[one.kin].model
        twin = made[one.kin]
        made[one.kin] = replace(twin, twin_of=(*twin.twin_of, one.model))
    return replace(plan, checkpoints=[*plan.checkpoints, *made.values()], twins=twins)


def _no_twin(one: Checkpoint) -> str:
    if one.named:
        return "a factory makes its own weights"
    return "it is wrapped in memory, where only its weights are known"


def _is_named(target: Any) -> bool:
    return isinstance(target, str | Path)


def _expanded(target: Any) -> Iterator[_Found]:
    """The checkpoints that a target means: itself, what a pattern matches, or steps in a folder."""
    text = str(target)
    path = Path(text).expanduser()
    if not _is_named(target) or text in zoo():
        yield _Found(target=target)
    elif path.is_dir() and not (path / "config.json").is_file():
        yield from _steps_in(path) or [_Found(target=target)]  # the latter is an error, told later
    elif has_magic(text) and not path.exists():
        there = sorted((Path(one) for one in glob(str(path))), key=natural_key)
        usable = [one for match in there for one in _matched(match)]
        if not usable:
            what = f"none of the {len(there)} that match is one" if there else "nothing matches"
            raise InputError(f"{text} names no checkpoint folder: {what}.")
        yield from usable
    else:
        yield _Found(target=target)


def _matched(path: Path) -> list[_Found]:
    """What one match of a pattern is; nothing for files and other folders."""
    if not path.is_dir():
        return []
    if STEP.fullmatch(path.name):
        return [_step(path)]
    if (path / "config.json").is_file():
        return [_Found(target=str(path))]
    return _steps_in(path)


def _steps_in(folder: Path) -> list[_Found]:
    """The subfolders of a run that are called after their step."""
    below = sorted((path for path in folder.iterdir() if path.is_dir()), key=natural_key)
    return [_step(path) for path in below if STEP.fullmatch(path.name)]


def _step(path: Path, target: Any = None) -> _Found:
    found = STEP.fullmatch(path.name)
    assert found is not None
    return _Found(
        target=str(path) if target is None else target,
        run=path.parent,
        prefix=found[1],
        step=int(found[2]),
    )


def _side_by_side(found: list[_Found]) -> list[_Found]:
    """Step folders that were named one by one (a shell expands patterns) are a series too."""
    paths = [Path(str(one.target)).expanduser() if _is_named(one.target) else None for one in found]
    guessed = [
        _step(path, one.target)
        if one.run is None and path is not None and STEP.fullmatch(path.name) and path.is_dir()
        else one
        for one, path in zip(found, paths, strict=True)
    ]
    many = Counter(one.series for one in guessed)
    return [new if many[new.series] > 1 else one for one, new in zip(found, guessed, strict=True)]


def _members(
    group: list[_Found], failed: list[tuple[str, str]], trust_remote_code: bool
) -> list[Checkpoint]:
    """The steps of one series that can be read, in order."""
    paths = [str(Path(str(one.target)).expanduser().resolve()) for one in group]
    if twice := sorted(path for path, n in Counter(paths).items() if n > 1):
        raise InputError(f"{', '.join(twice)} is given twice; give each checkpoint once.")
    found: dict[int, Checkpoint] = {}
    for one in sorted(group, key=lambda one: one.step or 0):
        assert one.step is not None
        try:
            if one.step in found:
                raise InputError(f"step {one.step} is there already, as {found[one.step].target}.")
            first = next(iter(found.values()), None)
            checkpoint = _looked_into(one.target, trust_remote_code, like=first)
        except (InputError, OSError) as error:
            failed.append((str(one.target), str(error)))
            continue
        found[one.step] = replace(checkpoint, step=one.step)
    return list(found.values())


def _looked_into(
    target: Any, trust_remote_code: bool, *, like: Checkpoint | None = None
) -> Checkpoint:
    """A checkpoint under its own name; `like` is one of the same series."""
    if not _is_named(target):
        return _in_memory(target)
    name, config = peek(target, trust_remote_code=trust_remote_code)
    place = locate(target, trust_remote_code=trust_remote_code, weights=False)
    return Checkpoint(
        target=target,
        model=name,
        plain=None if config is None else config.variant == "vanilla",
        foreign=config is None,
        kin=_kin(config, place) if like is None else like.kin,
        untrained=place.untrained,
    )


def _in_memory(model: Hooked) -> Checkpoint:
    """A model in memory."""
    name = str(model.name)
    untrained = bool((model.provenance or {}).get("untrained"))
    return Checkpoint(
        target=model,
        model=name,
        plain=model.is_plain,
        kin=model.twin_key(),
        untrained=untrained or is_twin_name(name),
    )


def _kin(config: LoopConfig | None, place: Target) -> Hashable:
    """What decides an untrained twin: the configuration and the tokenizer."""
    if place.kind == "factory":
        return None
    folder = Path(place.place)
    if place.kind == "native":
        file = folder / "tokenizer.json"
        return config, hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in _NOT_KIN}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in sorted({path for pattern in _KIN[1:] for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _labels(candidates: Sequence[tuple[str, ...]]) -> list[str]:
    """A name for each, all different: short, or as given where two are the same."""
    names = distinct_labels(candidates)
    if twice := sorted(name for name, n in Counter(names).items() if n > 1):
        raise InputError(
            f"{', '.join(twice)} is given twice; give each model once (two models in memory with "
            "one name: set model.name)."
        )
    return names


__all__ = ["STEP", "Checkpoint", "Plan", "look_up", "missing_steps", "with_twins"]
