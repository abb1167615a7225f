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
from loopscope.models import Hooked
from loopscope.models.native import LoopConfig
from loopscope.models.opening import Target, locate, peek, zoo
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
        return list(dict.fromkeys(checkpoint.model for checkpoint in self.checkpoints))


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A target before it is looked into; of a series it knows its run and step."""

    target: Any
    run: Path | None = None
    prefix: str = ""
    step: int | None = None

    @property
    def series(self) -> Hashable:
        return None if self.run is None else (self.run.resolve(), self.prefix.lower())


@dataclass(kw_only=True)
class _Entry:
    """A model of the tables: what it may be called, the shortest first, and its checkpoints."""

    names: tuple[str, ...]
    checkpoints: list[Checkpoint]
    steps: list[int] = field(default_factory=list)


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
    plan = Plan(checkpoints=[])
    entries = [
        _single(group[0].target, trust_remote_code)
        if group[0].run is None
        else _series(group, plan.failed, trust_remote_code)
        for group in _grouped(targets, series)
    ]
    for label, entry in zip(_labels([entry.names for entry in entries]), entries, strict=True):
        plan.checkpoints += [replace(checkpoint, model=label) for checkpoint in entry.checkpoints]
        if gaps := missing_steps(entry.steps):
            plan.missing[label] = gaps
    if not plan.checkpoints:
        reasons = "; ".join(f"{target}: {reason}" for target, reason in plan.failed)
        raise InputError(f"none of the steps can be read: {reasons}")
    return plan


def _grouped(targets: Sequence[Any], series: bool) -> list[list[_Candidate]]:
    """What the targets mean, in order; the steps of a series are one group."""
    candidates = [candidate for target in targets for candidate in _expanded(target)]
    if series:
        candidates = _side_by_side(candidates)
    else:
        candidates = [_Candidate(target=candidate.target) for candidate in candidates]
    groups: dict[Hashable, list[_Candidate]] = {}
    for number, candidate in enumerate(candidates):
        groups.setdefault(candidate.series or number, []).append(candidate)
    return list(groups.values())


def _single(target: Any, trust_remote_code: bool) -> _Entry:
    """A checkpoint by itself."""
    checkpoint = _looked_into(target, trust_remote_code)
    full = str(target) if checkpoint.named else checkpoint.model
    return _Entry(names=(checkpoint.model, full, full), checkpoints=[checkpoint])


def _series(
    group: list[_Candidate], failed: list[tuple[str, str]], trust_remote_code: bool
) -> _Entry:
    """A run; steps that cannot be read are added to `failed`."""
    run, prefix = group[0].run, group[0].prefix
    assert run is not None
    return _Entry(
        names=(run.resolve().name, str(run), f"{run}/{prefix}*"),
        checkpoints=_members(group, failed, trust_remote_code),
        steps=[candidate.step for candidate in group if candidate.step is not None],
    )


def missing_steps(steps: Sequence[int]) -> list[int]:
    """Steps that an otherwise regular series leaves out.

    Args:
        steps: Numbers of the steps that there are.

    Returns:
        The numbers in gaps that are multiples of the usual distance; empty where fewer than three
        steps or no more than half of the distances are equal.
    """
    present = sorted(set(steps))
    gaps = [b - a for a, b in pairwise(present)]
    usual, count = Counter(gaps).most_common(1)[0] if gaps else (0, 0)
    if count < 2 or 2 * count <= len(gaps):
        return []
    return [
        step
        for a, b in pairwise(present)
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
    for checkpoint in plan.checkpoints:
        if checkpoint.untrained and checkpoint.kin is not None:
            named.setdefault(checkpoint.kin, checkpoint.model)
    added: dict[Hashable, Checkpoint] = {}
    taken, twins = set(plan.models), dict(plan.twins)
    for checkpoint in plan.checkpoints:
        model, kin = checkpoint.model, checkpoint.kin
        if checkpoint.untrained or model in twins:
            continue
        if kin is None:
            plan.notes.append(f"{model}: no untrained twin: {_why_no_twin(checkpoint)}")
            continue
        if kin in named:
            twins[model] = named[kin]
            continue
        twin = added[kin] if kin in added else _twin(checkpoint, taken, seed)
        added[kin] = replace(twin, twin_of=(*twin.twin_of, model))
        twins[model] = twin.model
    return replace(plan, checkpoints=[*plan.checkpoints, *added.values()], twins=twins)


def _twin(checkpoint: Checkpoint, taken: set[str], seed: int) -> Checkpoint:
    """The untrained twin of a checkpoint, under a name that no other model has."""
    label = twin_name(checkpoint.model)
    if label in taken:
        label = twin_name(str(checkpoint.target))
    target = checkpoint.target
    twin = twin_name(str(target)) if checkpoint.named else target.untrained(seed)
    return replace(checkpoint, target=twin, model=label, step=None, untrained=True)


def _why_no_twin(checkpoint: Checkpoint) -> str:
    if checkpoint.named:
        return "a factory makes its own weights"
    return "it is wrapped in memory, where only its weights are known"


def _is_named(target: Any) -> bool:
    return isinstance(target, str | Path)


def _expanded(target: Any) -> Iterator[_Candidate]:
    """The checkpoints that a target means: itself, what a pattern matches, or steps in a folder."""
    text = str(target)
    path = Path(text).expanduser()
    if not _is_named(target) or text in zoo():
        yield _Candidate(target=target)
    elif path.is_dir() and not (path / "config.json").is_file():
        # without steps it is an error, told later
        yield from _steps_in(path) or [_Candidate(target=target)]
    elif has_magic(text) and not path.exists():
        matches = sorted((Path(name) for name in glob(str(path))), key=natural_key)
        candidates = [candidate for match in matches for candidate in _matched(match)]
        if not candidates:
            what = f"none of the {len(matches)} that match is one" if matches else "nothing matches"
            raise InputError(f"{text} names no checkpoint folder: {what}.")
        yield from candidates
    else:
        yield _Candidate(target=target)


def _matched(path: Path) -> list[_Candidate]:
    """What one match of a pattern is; nothing for files and other folders."""
    if not path.is_dir():
        return []
    if STEP.fullmatch(path.name):
        return [_step(path)]
    if (path / "config.json").is_file():
        return [_Candidate(target=str(path))]
    return _steps_in(path)


def _steps_in(folder: Path) -> list[_Candidate]:
    """The subfolders of a run that are called after their step."""
    subfolders = sorted((path for path in folder.iterdir() if path.is_dir()), key=natural_key)
    return [_step(path) for path in subfolders if STEP.fullmatch(path.name)]


def _step(path: Path, target: Any = None) -> _Candidate:
    match = STEP.fullmatch(path.name)
    assert match is not None
    return _Candidate(
        target=str(path) if target is None else target,
        run=path.parent,
        prefix=match[1],
        step=int(match[2]),
    )


def _side_by_side(candidates: list[_Candidate]) -> list[_Candidate]:
    """Step folders that were named one by one (a shell expands patterns) are a series too."""
    as_steps = [_as_step(candidate) for candidate in candidates]
    sizes = Counter(step.series for step in as_steps)
    pairs = zip(candidates, as_steps, strict=True)
    return [step if sizes[step.series] > 1 else candidate for candidate, step in pairs]


def _as_step(candidate: _Candidate) -> _Candidate:
    """A folder that is called after its step as a part of a series; anything else as it is."""
    target = candidate.target
    if candidate.run is not None or not _is_named(target):
        return candidate
    path = Path(str(target)).expanduser()
    return _step(path, target) if STEP.fullmatch(path.name) and path.is_dir() else candidate


def _members(
    group: list[_Candidate], failed: list[tuple[str, str]], trust_remote_code: bool
) -> list[Checkpoint]:
    """The steps of one series that can be read, in order."""
    paths = [str(Path(str(candidate.target)).expanduser().resolve()) for candidate in group]
    if twice := sorted(path for path, n in Counter(paths).items() if n > 1):
        raise InputError(f"{', '.join(twice)} is given twice; give each checkpoint once.")
    members: dict[int, Checkpoint] = {}
    for candidate in sorted(group, key=lambda candidate: candidate.step or 0):
        step = candidate.step
        assert step is not None
        try:
            if step in members:
                raise InputError(f"step {step} is there already, as {members[step].target}.")
            first = next(iter(members.values()), None)
            checkpoint = _looked_into(candidate.target, trust_remote_code, like=first)
        except (InputError, OSError) as error:
            failed.append((str(candidate.target), str(error)))
            continue
        members[step] = replace(checkpoint, step=step)
    return list(members.values())


def _looked_into(
    target: Any, trust_remote_code: bool, *, like: Checkpoint | None = None
) -> Checkpoint:
    """A checkpoint under its own name; `like` is another of the same series."""
    if not _is_named(target):
        return _in_memory(target)
    name, config = peek(target, trust_remote_code=trust_remote_code)
    source = locate(target, trust_remote_code=trust_remote_code, weights=False)
    return Checkpoint(
        target=target,
        model=name,
        plain=None if config is None else config.variant == "vanilla",
        foreign=config is None,
        kin=_kin(config, source) if like is None else like.kin,
        untrained=source.untrained,
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


def _kin(config: LoopConfig | None, source: Target) -> Hashable:
    """What decides an untrained twin: the configuration and the tokenizer."""
    if source.kind == "factory":
        return None
    folder = Path(source.place)
    if source.kind == "native":
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
