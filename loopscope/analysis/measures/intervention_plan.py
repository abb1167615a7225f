"""What to intervene on, in which windows, and what is put there: settled once for all samples.

Values that come from other texts come from reference windows, chosen from other documents than
those of the windows that are measured, as far as there are any; a window's own document never
takes part in what replaces its values, unless all windows are of one document.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopscope.analysis.inside_options import InterveneOptions
from loopscope.analysis.measures.counted_tokens import counted_tokens
from loopscope.analysis.measures.filling import SampleSet
from loopscope.errors import InputError
from loopscope.models import Hooked
from loopscope.probes import (
    KINDS,
    CleanRun,
    Intervention,
    Labels,
    Place,
    clean_run,
    fit_eraser,
    labels_of_text,
    place_named,
    places,
)
from loopscope.text import (
    BUILT_IN_LABELS,
)

DEFAULT_HOW = {
    "iteration": "skip", "attention": "mean", "mlp": "mean", "head": "mean", "slot": "mean",
    "write": "zero", "read": "zero", "edge": "mean",
}  # fmt: skip
"""What is done at a place of each kind where nothing is said.

An iteration is left out; a write or read is cut; what carries information about the token is
replaced by its mean over other texts, which takes the information and leaves the state where
states are (zero would not; another text's value would put wrong information in its place).
"""

DEFAULT_WHAT = ("iteration", "attention", "mlp", "slot", "write", "read", "edge")
"""Kinds of places where nothing is said; of attention and MLP whole iterations, not each layer."""

APPLIES = {
    "skip": ("iteration", "attention", "mlp", "head"),
    "zero": KINDS, "mean": KINDS, "resample": KINDS, "patch": KINDS,
    "erase": ("iteration", "attention", "mlp", "head", "slot", "edge"),
}  # fmt: skip
"""Kinds that each way applies to."""

REFERENCES = 24
"""Reference windows."""

PASSES = 1000
"""About so many passes are run where no number of windows is given, in at least `FEWEST`."""

FEWEST = 10

CONTROL = "erase_random"
"""Erasing as many directions for labels that mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An intervention: one place or several, one way.

    Attributes:
        what: Its name; of several places their names with `+`.
        places: Where.
        hows: What is done at each.
        how: The same as a word.
    """

    what: str
    places: tuple[Place, ...]
    hows: tuple[str, ...]
    how: str

    @property
    def kind(self) -> str:
        """The place's; `joint` of several."""
        return self.places[0].kind if len(self.places) == 1 else "joint"

    @property
    def t(self) -> int:
        """The first place's iteration."""
        return min(place.t for place in self.places)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and what it takes from other windows.

    Attributes:
        targets: The interventions.
        routed: Whether there are routers to be frozen.
        chosen: The windows that are measured, by number.
        why_not: Why nothing is; empty where something is.
        means: Place → the mean over the tokens of each reference window, (reference, …).
        admissible: Window → which references may stand in for it.
        partners: Window → the reference that it is resampled from.
        references: Their tokens, (reference, pos).
        erasers: (place, `erase` or `CONTROL`) → what erases.
        source: Tokens to patch from, (sample, pos), or None.
        answers: Counterfactual answers, (sample, pos), −100 where none is asked for; or None.
        counted: The tokens whose prediction counts, (sample, pos); None for all.
        notes: What a reader should know.
    """

    targets: tuple[Target, ...] = ()
    routed: bool = False
    chosen: tuple[int, ...] = ()
    why_not: str = ""
    means: Mapping[str, Tensor] = field(default_factory=dict)
    admissible: Mapping[int, Sequence[int]] = field(default_factory=dict)
    partners: Mapping[int, int] = field(default_factory=dict)
    references: Tensor | None = None
    erasers: Mapping[tuple[str, str], Callable[[Tensor], Tensor]] = field(default_factory=dict)
    source: Tensor | None = None
    answers: Tensor | None = None
    counted: Tensor | None = None
    notes: tuple[str, ...] = ()

    def needs(self, how: str) -> bool:
        """Tell whether any intervention is of a way.

        Args:
            how: The way.

        Returns:
            Whether there is one.
        """
        return any(how in target.hows for target in self.targets)

    def interventions(
        self,
        target: Target,
        windows: Sequence[int],
        partners: CleanRun | None,
        sources: CleanRun | None,
    ) -> list[Intervention]:
        """Give what is put at the places of a target.

        Args:
            target: The target.
            windows: The numbers of the windows of a batch.
            partners: A pass over the windows that they are resampled from.
            sources: A pass over those that they are patched from.

        Returns:
            An intervention for each place.
        """
        done = []
        for place, how in zip(target.places, target.hows, strict=True):
            value: Any = None
            if how == "mean":
                means = self.means[place.name]
                rows = [means[list(self.admissible[i])].mean(0) for i in windows]
                value = torch.stack(rows).unsqueeze(1)
            elif how in ("resample", "patch"):
                run = partners if how == "resample" else sources
                assert run is not None
                value = run.value(place)
            elif how in ("erase", CONTROL):
                value = self.erasers[place.name, how]
            way = "erase" if how == CONTROL else how
            done.append(Intervention(place, way, value))
        return done


def make_plan(
    model: Hooked, samples: SampleSet, options: InterveneOptions, *, batch_size: int
) -> Plan:
    """Settle what to do, and run the reference windows.

    Args:
        model: The model.
        samples: All samples.
        options: Where and how to intervene.
        batch_size: Windows per forward pass.

    Returns:
        The plan; one with `why_not` where there is nothing to do.

    Raises:
        InputError: for places that do not exist, or options that do not fit the samples.
    """
    if samples.tokens is None:
        return Plan(why_not="the samples are not windows of tokens")
    if reason := model.why_no_loss():
        return Plan(why_not=reason)
    first = clean_run(model, samples.batch(range(1)), anew=False)
    targets, notes = _targets(model, first, options)
    if not targets:
        return Plan(why_not="; ".join(notes) or "there is no such place", notes=tuple(notes))
    source, answers = _pairs(samples, options, targets)
    routed = any(name.endswith(".hook_weights") for name in first.kept)
    documents = _documents(samples)
    most = _most(options, len(targets) * (1 + routed), len(samples), pairs=source is not None)
    counted = counted_tokens(model, samples, options.where)
    useful = [i for i in range(len(samples)) if counted is None or counted[i, 1:].any()]
    if not useful:
        return Plan(why_not=f"no token of the samples is {options.where!r}")
    chosen = [useful[i] for i in spread([documents[i] for i in useful], most)]
    if len(chosen) < len(samples):
        notes.append(
            f"on {len(chosen)} of {len(samples)} windows, of "
            f"{len({documents[i] for i in chosen})} documents (give windows=… for more)"
        )
    plan = Plan(
        targets=tuple(targets), routed=routed, chosen=tuple(chosen), source=source, answers=answers,
        counted=None if counted is None else torch.from_numpy(counted), notes=tuple(notes),
    )  # fmt: skip
    return _with_references(plan, model, samples, options, documents, batch_size)


def spread(documents: Sequence[Any], most: int) -> list[int]:
    """Choose windows of as many documents as can be: the first of each, then the second.

    Args:
        documents: The document of each window.
        most: How many to choose at most.

    Returns:
        Their numbers, in order.
    """
    return sorted(_by_turn(documents)[:most])


def _by_turn(documents: Sequence[Any]) -> list[int]:
    seen: dict[Any, int] = {}
    turns = []
    for document in documents:
        turns.append(seen.get(document, 0))
        seen[document] = turns[-1] + 1
    return sorted(range(len(documents)), key=lambda i: (turns[i], i))


def _documents(samples: SampleSet) -> list[Any]:
    """The document of each window; one without is a document of its own, equal windows one."""
    known = list(samples.documents) or [None] * len(samples)
    return [key if name is None else name for name, key in zip(known, samples.keys, strict=True)]


def _most(options: InterveneOptions, passes: int, samples: int, *, pairs: bool) -> int:
    """How many windows to measure, given the passes that each takes."""
    if options.windows is not None:
        return options.windows
    return samples if pairs else max(FEWEST, PASSES // passes)


# -- where and how -----------------------------------------------------------------------------


def _targets(
    model: Hooked, first: CleanRun, options: InterveneOptions
) -> tuple[list[Target], list[str]]:
    """The interventions, and a line for each kind or way that cannot be."""
    targets: list[Target] = []
    notes: list[str] = []
    named = options.what or DEFAULT_WHAT
    kinds = tuple(what for what in named if what in KINDS)
    of_kind, missing = places(model, first.trajectory, kinds) if kinds else ([], [])
    notes += missing
    if not options.what:
        of_kind = [p for p in of_kind if p.kind not in ("attention", "mlp") or p.layer is None]
    for what in named:
        groups: list[tuple[Place, ...]]
        if what in KINDS:
            groups = [(place,) for place in of_kind if place.kind == what]
        else:
            names = [name.strip() for name in what.split("+")]
            groups = [tuple(place_named(model, first.trajectory, name) for name in names)]
        for group in groups:
            targets += _ways(group, options, notes)
    unique = {(target.what, target.how): target for target in targets}
    return list(unique.values()), list(dict.fromkeys(notes))


def _ways(group: tuple[Place, ...], options: InterveneOptions, notes: list[str]) -> list[Target]:
    """What is done at one place, or at several at once."""
    what = "+".join(place.name for place in group)
    made = []
    implied = "erase" if options.labels is not None else ""
    implied = "patch" if options.source is not None else implied
    for how in options.how or (implied,):
        hows = tuple(how or DEFAULT_HOW[place.kind] for place in group)
        reasons = [_why_not(p, way) for p, way in zip(group, hows, strict=True)]
        if any(reasons):
            notes += filter(None, reasons)
            continue
        ways = dict.fromkeys(hows)
        made.append(Target(what=what, places=group, hows=hows, how="+".join(ways)))
        if set(ways) == {"erase"}:
            control = (CONTROL,) * len(group)
            made.append(Target(what=what, places=group, hows=control, how=CONTROL))
    return made


def _why_not(place: Place, how: str) -> str:
    """Why a way does not apply to a place; empty where it does."""
    if place.kind not in APPLIES[how]:
        return f"{how} does not apply to {place.kind}"
    if how == "erase" and len(place.hooks) > 1:
        return f"erase applies to one layer at a time, so not to {place.name}"
    return ""


def _pairs(
    samples: SampleSet, options: InterveneOptions, targets: Sequence[Target]
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens to patch from and counterfactual answers, as tensors that fit the samples."""
    tokens = samples.tokens
    assert tokens is not None
    source = answers = None
    patched = any("patch" in target.hows for target in targets)
    if options.source is not None:
        source = torch.as_tensor(np.asarray(getattr(options.source, "tokens", options.source)))
        if source.shape != tokens.shape or source.is_floating_point():
            raise InputError(
                f"source must hold the tokens that each window is patched from, "
                f"{tuple(tokens.shape)} integers like the samples, given {tuple(source.shape)}."
            )
        source = source.long()
    elif patched:
        raise InputError("how='patch' takes source=, the tokens that each window is patched from.")
    if options.answers is not None:
        answers = torch.as_tensor(np.asarray(options.answers)).long()
        if answers.shape == tokens.shape[:1]:  # after the last token
            whole = torch.full(tokens.shape, NOT_ASKED)
            whole[:, -1] = answers
            answers = whole
        if answers.shape != tokens.shape:
            raise InputError(
                f"answers must hold the token that should follow each window ({len(tokens)},), or "
                f"each of its tokens {tuple(tokens.shape)} with {NOT_ASKED} where none is asked "
                f"for; given {tuple(answers.shape)}."
            )
    return source, answers


NOT_ASKED = -100
"""In place of an answer: none is asked for there."""


# -- other windows -----------------------------------------------------------------------------


def _with_references(
    plan: Plan,
    model: Hooked,
    samples: SampleSet,
    options: InterveneOptions,
    documents: Sequence[Any],
    batch_size: int,
) -> Plan:
    """The plan with what it takes from other windows."""
    if not any(plan.needs(how) for how in ("mean", "resample", "erase")):
        return plan
    rows = _references(documents, plan.chosen)
    admissible: dict[int, list[int]] = {}
    for i in plan.chosen:
        others = [r for r, j in enumerate(rows) if documents[j] != documents[i]]
        admissible[i] = others or [r for r, j in enumerate(rows) if j != i]
    notes = list(plan.notes)
    if not all(admissible.values()):
        left = [t for t in plan.targets if not {*t.hows} & {"mean", "resample", "erase", CONTROL}]
        why = "mean, resample and erase take other windows, and there is only one"
        values = plan.__dict__ | {"targets": tuple(left), "notes": (*plan.notes, why)}
        return Plan(**values | {"why_not": "" if left else why})
    if len({documents[i] for i in (*plan.chosen, *rows)}) == 1:
        notes.append("all windows are of one document: values of other texts are of that one too")
    elif plan.needs("erase") and {documents[i] for i in plan.chosen} & {documents[j] for j in rows}:
        notes.append("what erases is fitted to measured documents too; give more samples")
    rng = {i: np.random.default_rng([options.seed, i]) for i in plan.chosen}
    tokens = samples.tokens
    assert tokens is not None
    references = tokens[rows]
    means, states = _reference_values(plan, model, references, batch_size)
    erasers: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    if states:
        erasers = _erasers(states, _labels(model, samples, options, rows), options.seed)
    return Plan(
        **plan.__dict__
        | {
            "means": means,
            "admissible": admissible,
            "partners": {i: int(rng[i].choice(admissible[i])) for i in plan.chosen},
            "references": references,
            "erasers": erasers,
            "notes": tuple(notes),
        }
    )


def _references(documents: Sequence[Any], chosen: Sequence[int]) -> list[int]:
    """Windows to take values from: of documents that are not measured first."""
    measured = {documents[i] for i in chosen}
    order = _by_turn(documents)
    apart = [i for i in order if documents[i] not in measured]
    if len(apart) >= REFERENCES // 2:
        return sorted(apart[:REFERENCES])
    rest = [i for i in order if documents[i] in measured]
    return sorted([*apart, *rest][:REFERENCES])


@torch.no_grad()
def _reference_values(
    plan: Plan, model: Hooked, references: Tensor, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over the tokens of each window at each place, and whole states where labels go."""
    pairs = {
        (place, how)
        for target in plan.targets
        for place, how in zip(target.places, target.hows, strict=True)
    }
    averaged = {place.name: place for place, how in pairs if how == "mean"}
    erased = {place.name: place for place, how in pairs if how == "erase"}
    means: dict[str, list[Tensor]] = {name: [] for name in averaged}
    states: dict[str, list[Tensor]] = {name: [] for name in erased}
    if averaged or erased:
        for part in references.split(batch_size):
            run = clean_run(model, part, anew=False)
            for name, place in averaged.items():
                value = run.value(place)
                wide = torch.promote_types(value.dtype, torch.float32)
                means[name].append(value.mean(1, dtype=wide))
            for name, place in erased.items():
                states[name].append(run.value(place))
    return (
        {name: torch.cat(parts) for name, parts in means.items()},
        {name: torch.cat(parts) for name, parts in states.items()},
    )


def _labels(
    model: Hooked, samples: SampleSet, options: InterveneOptions, rows: Sequence[int]
) -> Labels:
    """The label of each token of some windows, (window, pos)."""
    tokens = samples.tokens
    assert tokens is not None
    if not options.labels:
        raise InputError(
            f"how='erase' takes labels=: one of {', '.join(BUILT_IN_LABELS)}, or one label per "
            "token or per window."
        )
    ((name, given),) = options.labels.items()
    if given is None:
        return _built_in(model, name, tokens[list(rows)])
    labels = given.of_samples(name, *tokens.shape).chosen(rows)
    if labels.values.ndim == 2:
        return labels
    return Labels(values=np.repeat(labels.values[:, None], tokens.shape[1], axis=1))


def _built_in(model: Hooked, name: str, tokens: Tensor) -> Labels:
    """Labels that the text gives."""
    if name == "position":
        values = np.tile(np.arange(float(tokens.shape[1])), (len(tokens), 1))
        return Labels(values=values)
    if model.tokenizer is None:
        raise InputError(
            f"labels {name!r} are told from text, and the model has no tokenizer; give one label "
            "per token."
        )
    return labels_of_text(model.tokenizer, tokens.tolist(), [name])[0][name]


def _erasers(
    states: Mapping[str, Tensor], labels: Labels, seed: int
) -> dict[tuple[str, str], Callable[[Tensor], Tensor]]:
    """What erases the labels at each place, and as many directions that mean nothing."""
    erasers: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    present = torch.from_numpy(labels.present.reshape(-1))
    values = torch.from_numpy(labels.values.reshape(-1))[present]
    for name, state in states.items():
        tokens = state.flatten(0, 1)[present.to(state.device)]
        eraser = fit_eraser(tokens, values)
        noise = torch.randn(len(tokens), max(1, eraser.rank), generator=generator)
        erasers[name, "erase"], erasers[name, CONTROL] = eraser, fit_eraser(tokens, noise)
    return erasers
