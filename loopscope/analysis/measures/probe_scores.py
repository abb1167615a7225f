"""Probe scores: linear probes for labels at every state, beside four controls; their rows."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import Flag
from loopscope.analysis.inside_options import ProbeOptions
from loopscope.analysis.measures.filling import MeasureRows, SampleSet, Setup
from loopscope.analysis.options import Options
from loopscope.analysis.tables import Rows, columns
from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.names import is_twin_name
from loopscope.probes import (
    TARGETS,
    Labels,
    Places,
    SampleScores,
    TokenScores,
    answers,
    by_sample,
    collect_states,
    cross_validated,
    fit_together,
    group_folds,
    labels_of_text,
    random_labels,
    shuffled_labels,
    target_kind,
    targets,
)
from loopscope.text import CLASS_LABELS, token_pieces

CONTROLS = ("none", "types", "shuffled", "untrained")
"""The score itself; a random label per token type (or document); shuffled labels; the twin."""

Place = tuple[int, str]
"""Number of a loop, and a target in it."""
Key = tuple[str, str, str]
"""Labels, target, control."""
Scores = tuple[SampleScores, np.ndarray]
"""Scores of the samples, and which of them had states that are not finite."""


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """What probes give for all samples of a model.

    Attributes:
        loops: The scores in each loop, in the order of the trajectory's courses.
        notes: What was left out, and how tokens were chosen.
    """

    loops: list[dict[Key, Scores]]
    notes: list[str]


class ProbeRows(MeasureRows):
    """The table `probe`: every sample scored by probes fitted to other documents."""

    @classmethod
    def prepare(
        cls,
        model: Hooked,
        samples: SampleSet,
        options: Options,
        *,
        batch_size: int,
        longer: Hooked | None = None,
    ) -> ProbeResults:
        return _Probing(model, samples, options, batch_size).results()

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        results: ProbeResults = setup.prepared["probe"]
        part = slice(setup.start, setup.start + setup.samples)
        self.rows: dict[str, Rows] = {}
        for loop, scores in zip(setup.first.courses, results.loops, strict=True):
            if scores:
                keys = columns(("labels", "target", "control"), list(scores))
                self.rows[loop] = Rows("probe", setup.samples, keys)
                for row, of_samples in enumerate(scores.values()):
                    _fill(self.rows[loop], row, *of_samples, part)
        self.note = "; ".join(f"probe: {note}" for note in results.notes)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {"probe": [rows.frame(model, loop) for loop, rows in self.rows.items()]}


def _fill(rows: Rows, row: int, scores: SampleScores, unsound: np.ndarray, part: slice) -> None:
    for column, values in rows.values.items():
        values[:, row] = np.where(unsound, np.nan, getattr(scores, column))[part]
    missing = np.where(np.isfinite(scores.score), Flag.NONE, Flag.ZERO)
    rows.flag[:, row] = np.where(unsound, Flag.NONFINITE, missing)[part]


@dataclass(kw_only=True)
class _Tasks:
    """What is to be learnt at samples of one number of positions.

    Attributes:
        places: The chosen tokens of all labels.
        used: Labels → which of these are theirs.
        y: Labels and control → the label of each token that is theirs.
    """

    places: Places
    used: dict[str, np.ndarray] = field(default_factory=dict)
    y: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One probe.

    Attributes:
        x: States of chosen tokens.
        rows: Which of them are labelled and sound.
        y: Their labels.
        sample: Their samples.
        fold: Their folds.
        classes: Whether the labels are classes.
        unsound: Which samples had a labelled token whose state is not finite.
    """

    x: np.ndarray
    rows: np.ndarray
    y: np.ndarray
    sample: np.ndarray
    fold: np.ndarray
    classes: bool
    unsound: np.ndarray

    def run(self) -> TokenScores:
        """Fit and score, fold by fold."""
        return cross_validated(self.x[self.rows], self.y, self.fold, classes=self.classes)

    def by_sample(self, scores: TokenScores, samples: int) -> Scores:
        """Average over the tokens of each sample."""
        return by_sample(scores, self.sample, samples, classes=self.classes), self.unsound


class _Probing:
    """The labels, tokens and fits of one model on all its samples."""

    def __init__(
        self, model: Hooked, samples: SampleSet, options: Options, batch_size: int
    ) -> None:
        self.model, self.samples, self.batch_size = model, samples, batch_size
        assert isinstance(options.probe, ProbeOptions)
        self.drop, self.chosen = options.drop_first, options.probe
        self.slots = any(target_kind(name) == "m" for name in self.chosen.of)
        self.notes: list[str] = []

    def results(self) -> ProbeResults:
        """Fit all probes; none where nothing can be held out, or nothing is labelled."""
        _, first = next(self._trajectories(self.model, self.batch_size))
        loops: list[dict[Key, Scores]] = [{} for _ in first.courses]
        self._share_out()
        self.labels = self._labels(first) if self.fold.any() else {}
        if not self.labels:
            return ProbeResults(loops=loops, notes=self.notes)
        wanted = {
            (number, name): state
            for number, loop in enumerate(first.courses.values())
            for name, state in targets(loop, self.chosen.of).items()
        }
        self._note_missing({name for _, name in wanted})
        # loops share h_emb and h_out: each tensor is probed once
        once = {id(state): place for place, state in reversed(wanted.items())}
        same = {place: once[id(state)] for place, state in wanted.items()}
        self.pos = {place: state.shape[1] for place, state in wanted.items()}
        self.tasks = {pos: self._tasks(pos, first.positions) for pos in {*self.pos.values()}}
        del first, wanted, once

        places = {*same.values()}
        fits = dict(self._fits(self._collect(self.model, places), CONTROLS[:3]))
        if (twin := self._twin()) is not None:
            fits |= dict(self._fits(self._collect(twin, places), CONTROLS[3:]))
        tokens, unfinished = fit_together(
            [fit.run for fit in fits.values()], threads=torch.get_num_threads()
        )
        if unfinished:
            self.notes.append(f"{unfinished} logistic regressions had not converged")
        scores = {
            key: fit.by_sample(of_tokens, len(self.samples))
            for (key, fit), of_tokens in zip(fits.items(), tokens, strict=True)
        }
        for name in self.labels:
            for (number, target), place in same.items():
                for control in CONTROLS:
                    if (place, name, control) in scores:
                        loops[number][name, target, control] = scores[place, name, control]
        return ProbeResults(loops=loops, notes=self.notes)

    def _trajectories(self, model: Hooked, batch_size: int) -> Iterator[tuple[int, Trajectory]]:
        """The number of each batch's first sample, and its trajectory."""
        for start in range(0, len(self.samples), batch_size):
            numbers = range(start, min(start + batch_size, len(self.samples)))
            yield start, model.capture(self.samples.batch(numbers), memory=self.slots)

    def _share_out(self) -> None:
        """Groups of samples that belong together, and the fold of each sample."""
        keys = list(self.samples.keys)
        documents = list(self.samples.documents) or [None] * len(keys)
        groups = keys
        if len(set(documents)) > 1:
            pairs = zip(documents, keys, strict=True)
            groups = [key if document is None else document for document, key in pairs]
        else:
            known = "all samples are of one document" if documents[0] else "no documents are known"
            self.notes.append(f"{known}, so each sample is a group of its own")
        self.fold = group_folds(groups, self.chosen.folds)
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        self.group = np.array([number[group] for group in groups])
        if not self.fold.any():
            self.notes[:] = ["all samples are of one group, so none can be held out"]
        elif len(number) < self.chosen.folds:
            self.notes.append(f"there are {len(number)} groups of samples, hence as many folds")

    def _labels(self, first: Trajectory) -> dict[str, Labels]:
        """Those asked for, each checked to fit the samples; without those that need text."""
        samples, pos = len(self.samples), first.positions
        given = self.chosen.labels
        asked = dict.fromkeys(CLASS_LABELS) if given is None else dict(given)
        labels = {
            name: values.of_samples(name, samples, pos)
            for name, values in asked.items()
            if values is not None
        }
        built_in = [name for name, values in asked.items() if values is None]
        of_text = [name for name in built_in if name != "position"]
        tokens, tokenizer = self.samples.tokens, self.model.tokenizer
        why_not = _why_no_text(tokens, tokenizer) if of_text else ""
        if why_not:
            self.notes.append(f"{why_not}, so tokens have no {', '.join(of_text)} labels")
            built_in = ["position"] if given is None else [x for x in built_in if x == "position"]
            of_text = []
        if of_text:
            assert tokens is not None
            told, python = labels_of_text(tokenizer, tokens.tolist(), of_text)
            labels |= told
            if not python:
                self.notes.append("the text is not Python: classes are those of its characters")
        if "position" in built_in:
            labels["position"] = Labels(values=np.tile(np.arange(float(pos)), (samples, 1)))
        for name, each in labels.items():
            values = np.unique(each.values[each.present])
            if len(values) < 2:
                some = "one value, so their scores mean nothing" if len(values) else "no value"
                self.notes.append(f"labels {name!r} have {some}")
        return {name: labels[name] for name in (*asked, "position") if name in labels}

    def _note_missing(self, names: set[str]) -> None:
        asked = {name for name in self.chosen.of if not any(answers(name, x) for x in names)}
        if asked:
            words = [TARGETS.get(name, name) for name in self.chosen.of if name in asked]
            self.notes.append(f"the model has no {', '.join(words)}")

    def _tasks(self, pos: int, positions: int) -> _Tasks:
        """Choose tokens, and what is to be learnt of them, at samples of some positions."""
        begin = self.drop if pos >= positions else 0
        order = [
            begin + np.random.default_rng((0, i)).permutation(pos - begin)
            for i in range(len(self.samples))
        ]
        chosen: dict[str, np.ndarray] = {}
        for name, labels in self.labels.items():
            present = labels.present
            if present.ndim == 1:
                present = np.repeat(present[:, None], pos, axis=1)
            if present.shape[1] != pos:
                continue
            chosen[name] = np.zeros_like(present)
            for i, places in enumerate(order):
                labelled = places[present[i, places]]
                chosen[name][i, labelled[: self.chosen.probed_tokens]] = True
        if other := [name for name in self.labels if name not in chosen]:
            self.notes.append(
                f"states of {pos} positions of their own have no labels of tokens "
                f"({', '.join(other)})"
            )
        if not chosen:
            return _Tasks(places=Places(np.zeros(0, np.int64), np.zeros(0, np.int64)))
        either = np.logical_or.reduce(list(chosen.values()))
        sample, column = np.nonzero(either)
        tasks = _Tasks(places=Places(sample, column))
        for name, mask in chosen.items():
            tasks.used[name] = used = mask[sample, column]
            tasks.y |= self._controls(name, sample[used], column[used])
        if chosen and (most := int(max(m.sum(1).max() for m in chosen.values()))) < pos - begin:
            self.notes.append(f"fitted to {most} of each sample's {pos} positions (probed_tokens)")
        return tasks

    def _controls(
        self, name: str, sample: np.ndarray, pos: np.ndarray
    ) -> dict[tuple[str, str], np.ndarray]:
        """The labels of tokens, and what takes their place in the controls."""
        labels = self.labels[name]
        of_samples = labels.values.ndim == 1
        y = labels.values[sample] if of_samples else labels.values[sample, pos]
        seed = zlib.crc32(name.encode())
        unit = sample if of_samples else np.arange(len(y))
        made = {"none": y, "shuffled": shuffled_labels(y, unit, (seed, 1)), "untrained": y}
        if of_samples:
            made["types"] = random_labels(y, self.group[sample], (seed, 2))
        elif (tokens := self.samples.tokens) is not None and tokens.shape[1] > pos.max(initial=-1):
            made["types"] = random_labels(y, tokens.numpy()[sample, pos], (seed, 2))
        return {(name, control): values for control, values in made.items()}

    def _twin(self) -> Hooked | None:
        if is_twin_name(str(self.model.name)):
            self.notes.append("the model is untrained, so it is not held against a twin")
            return None
        if self.model.twin_key() is None:
            self.notes.append("the model has no untrained twin to be held against")
            return None
        return self.model.untrained()

    def _collect(self, model: Hooked, places: set[Place]) -> dict[Place, np.ndarray]:
        """The states of the chosen tokens, each target once."""

        def wanted(trajectory: Trajectory) -> dict[Place, Tensor]:
            return {
                (number, name): state
                for number, loop in enumerate(trajectory.courses.values())
                for name, state in targets(loop, self.chosen.of).items()
                if (number, name) in places and self.tasks[state.shape[1]].used
            }

        chosen = {pos: tasks.places for pos, tasks in self.tasks.items()}
        return collect_states(self._trajectories(model, self.batch_size), wanted, chosen)

    def _fits(
        self, states: dict[Place, np.ndarray], controls: Sequence[str]
    ) -> Iterator[tuple[tuple[Place, str, str], _Fit]]:
        for place, x in states.items():
            tasks = self.tasks[self.pos[place]]
            sound = np.isfinite(x).all(1)
            for name, used in tasks.used.items():
                rows = used & sound
                sample = tasks.places.sample[rows]
                unsound = np.zeros(len(self.samples), bool)
                unsound[tasks.places.sample[used & ~sound]] = True
                for control in controls:
                    if (y := tasks.y.get((name, control))) is not None:
                        yield (place, name, control), _Fit(
                            x=x, rows=rows, y=y[sound[used]], sample=sample,
                            fold=self.fold[sample], classes=self.labels[name].are_classes,
                            unsound=unsound,
                        )  # fmt: skip


def _why_no_text(tokens: Tensor | None, tokenizer: Any) -> str:
    """Why tokens cannot be read as text; empty where they can."""
    if tokens is None:
        return "there is no text"
    if tokenizer is None:
        return "there is no tokenizer"
    try:
        token_pieces(tokenizer, tokens[0].tolist())
    except InputError as error:
        return str(error).rstrip(".")
    return ""
