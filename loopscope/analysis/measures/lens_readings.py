"""Lens readings: what every state would predict, per sample, and token by token for the first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from loopscope.analysis.flags import Flag
from loopscope.analysis.inside_options import LensOptions
from loopscope.analysis.measures.counted_tokens import counted_tokens
from loopscope.analysis.measures.filling import Batch, MeasureRows, SampleSet, Setup
from loopscope.analysis.measures.lens_fitting import FittedLens, fitted_lens
from loopscope.analysis.measures.readout_losses import beyond
from loopscope.analysis.options import Options
from loopscope.analysis.tables import MEASURED, Rows, columns
from loopscope.models import Hooked, Trajectory
from loopscope.names import state_name
from loopscope.probes import (
    OWN,
    VALUES,
    LensReader,
    LensState,
    layer_states,
    lens_states,
    lens_values,
    samples_at_once,
    top_tokens,
    why_no_coda_lens,
    why_no_logit_lens,
)
from loopscope.text import token_texts


class LensRows(MeasureRows):
    """The tables `lens`, per state and sample, and `lens_tokens`, of the first sample."""

    @classmethod
    def prepare(
        cls,
        model: Hooked,
        samples: SampleSet,
        options: Options,
        *,
        batch_size: int,
        longer: Hooked | None = None,
    ) -> tuple[FittedLens | None, np.ndarray | None]:
        lens = _own(options)
        counted = counted_tokens(model, samples, lens.where)
        if not lens.tuned:
            return None, counted
        return fitted_lens(model, samples, lens.tuned_folder, batch_size=batch_size), counted

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.model, self.longer, self.words = setup.model, setup.longer, setup.words
        self.options, self.start = _own(setup.options), setup.start
        self.loop, self.K = setup.first.loop, setup.first.K
        self.fitted: FittedLens | None
        self.fitted, self.counted = setup.prepared.get("lens", (None, None))
        self.rows: Rows | None = None
        self.tokens: Rows | None = None
        if setup.no_logits or setup.first.logits is None:
            reason = setup.no_logits or "the model returns no logits for each token"
            self.note = f"lens: {reason}, so its tables have no rows"
            return
        kinds, remarks = self._kinds(setup.first)
        more = []
        if self.longer is not None and self.K:
            more = list(beyond(self.K, self.longer.K, cheap=self.model.reads_out_cheaply))
        layers = list(self.model.layer_hooks()) if self.options.within else []
        if self.options.within and not layers:
            remarks.append("lens: no layer of the model gives the stream, so none is read within")
        self.lenses = self._listed(kinds, more, layers)
        self.note = "; ".join(remarks)
        if self.lenses:
            keys = [(lens.kind, lens.state, lens.beyond) for lens in self.lenses]
            names = ("kind", "state", "beyond")
            self.rows = Rows("lens", setup.samples, columns(names, keys))

    def _kinds(self, first: Trajectory) -> tuple[list[str], list[str]]:
        """The lenses that the model allows, and why others are left out."""
        kinds: list[str] = []
        remarks: list[str] = []
        no_logit = why_no_logit_lens(self.model, first)
        self.unembeds = not no_logit
        for kind in self.options.kinds:
            why_not = no_logit if kind == "logit" else why_no_coda_lens(self.model, first)
            if why_not:
                remarks.append(f"lens: no {kind} lens: {why_not}")
            else:
                kinds.append(kind)
        if self.options.tuned:
            why_not = "" if self.fitted is None else self.fitted.why_not
            if why_not or self.fitted is None:
                remarks.append(f"lens: no tuned lens: {why_not}")
            else:
                kinds.append("tuned")
        return kinds, remarks

    def _listed(
        self, kinds: Sequence[str], more: Sequence[int], layers: Sequence[str]
    ) -> list[LensState]:
        """Lenses and states; the coda reads no layer of its own, maps are of states alone."""
        plain = [kind for kind in kinds if kind != "tuned"]
        lenses = lens_states(plain, self.K, more=more, layers=layers)
        if "tuned" in kinds and self.fitted is not None and self.fitted.lens is not None:
            mapped = self.fitted.lens.states
            lenses += [lens for lens in lens_states(["tuned"], self.K) if lens.state in mapped]
        return lenses

    def add(self, batch: Batch) -> None:
        if self.rows is None:
            return
        trajectory = batch.trajectory
        states = self._further_states(batch)
        at_once = samples_at_once(self.model, trajectory, len(self.lenses), unembeds=self.unembeds)
        for begin in range(0, len(trajectory.h_emb), at_once):
            part = slice(begin, min(begin + at_once, len(trajectory.h_emb)))
            first = batch.samples.start + part.start
            numbers = slice(first, first + part.stop - part.start)
            self._add_part(_cut(trajectory, part), {n: s[part] for n, s in states.items()}, numbers)

    def _further_states(self, batch: Batch) -> dict[str, Tensor]:
        """The states that the trajectory has not: layers, and those beyond K."""
        states = layer_states(self.model, batch.inputs) if self.options.within else {}
        longer = batch.longer
        if longer is not None:
            states |= {state_name(t): longer.h[t] for t in range(self.K + 1, longer.K + 1)}
        return states

    def _add_part(
        self, trajectory: Trajectory, states: Mapping[str, Tensor], numbers: slice
    ) -> None:
        assert self.rows is not None
        of_all = slice(numbers.start + self.start, numbers.stop + self.start)
        fitted = self.fitted
        reader = LensReader(
            self.model, trajectory, states, longer=self.longer, unembeds=self.unembeds,
            maps=None if fitted is None else lambda h, name: fitted.bring(h, name, of_all),
        )  # fmt: skip
        values = lens_values(reader, self.lenses)
        exact = reader.own.dtype == torch.float64
        counted = None if self.counted is None else torch.tensor(self.counted[of_all, 1:])
        for column, lens in enumerate(self.lenses):
            if lens.key not in values:
                self.rows.flag[numbers, column] = Flag.SHAPE
                continue
            means = sample_means(values, lens, exact=exact, counted=counted)
            for name, mean in means.items():
                self.rows.values[name][numbers, column] = mean
            # what it predicts itself; comparisons with a final state that is lost are NaN alone
            lost = ~np.isfinite(means["loss"] + means["entropy"])
            for name in means:
                of_value = self.rows.values[name][numbers, column]
                of_value[lost] = np.nan
            self.rows.flag[numbers, column] = np.where(lost, Flag.NONFINITE, Flag.NONE)
            if counted is not None:
                self.rows.flag[numbers, column][~counted.any(1).numpy()] = Flag.ZERO
        if numbers.start == 0 and self.words is not None:
            read = [lens for lens in self.lenses if lens.key in values]
            self.tokens = token_rows(reader, read, self.words, self.options.top_k)

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        tables = {"lens": self.rows, "lens_tokens": self.tokens}
        return {
            name: [] if rows is None else [rows.frame(model, self.loop)]
            for name, rows in tables.items()
        }


def _own(options: Options) -> LensOptions:
    assert isinstance(options.lens, LensOptions)  # a mapping was turned into it
    return options.lens


def _cut(trajectory: Trajectory, part: slice) -> Trajectory:
    """What a reader needs of a trajectory, of some of its samples."""
    assert trajectory.logits is not None and trajectory.tokens is not None
    if part == slice(0, len(trajectory.h_emb)):
        return trajectory
    return replace(
        trajectory, h_emb=trajectory.h_emb[part], h=tuple(h[part] for h in trajectory.h),
        h_m=tuple(h[part] for h in trajectory.h_m), h_out=trajectory.h_out[part],
        logits=trajectory.logits[part], tokens=trajectory.tokens[part], memory=None, w_write=None,
        w_read=None, transition=None, blocks={}, gates={}, others={}, named={}, output=None,
    )  # fmt: skip


def sample_means(
    values: Mapping[tuple[str, str], Tensor],
    lens: LensState,
    *,
    exact: bool,
    counted: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Average a lens on a state over the tokens of each sample.

    Args:
        values: What `lens_values` gives.
        lens: The lens and the state.
        exact: Whether the model computes in float64; otherwise the loss is summed in float32, as
            torch's cross-entropy does, so that it is the model's bit for bit.
        counted: The positions whose next token counts, (batch, pos − 1); all when not given.

    Returns:
        Column of the table → one number per sample, sums in float64; `flipped` is NaN for the
        first state.
    """
    token = dict(zip(VALUES, values[lens.key], strict=True))
    own = dict(zip(VALUES, values[OWN], strict=True))
    token["top_final"] = _agreement(token["top"], own["top"])
    token["flipped"] = torch.full_like(token["top"], torch.nan)
    if lens.previous is not None and (lens.kind, lens.previous) in values:
        before = values[lens.kind, lens.previous][VALUES.index("top")]
        token["flipped"] = 1 - _agreement(token["top"], before)
    token["rank_final_median"] = token["rank_final"]
    token["rank_true_median"] = token["rank_true"]
    means = {}
    for name in MEASURED["lens"].values:
        x = token[name]
        if name in _OF_THE_NEXT or counted is not None:
            x = x[:, :-1]  # nothing follows the last token
        if name == "loss" and counted is None:
            means[name] = _mean_loss(x, exact=exact)
        else:
            means[name] = _averaged(x, counted, median=name.endswith("median"))
    return means


_OF_THE_NEXT = ("loss", "rank_true", "rank_true_median")


def _averaged(values: Tensor, counted: Tensor | None, *, median: bool) -> np.ndarray:
    """The mean, or median, of each sample over its counted positions; NaN where there are none."""
    if counted is None:
        return np.median(values.numpy(), axis=1) if median else values.mean(1).numpy()
    chosen = [sample[keep].numpy() for sample, keep in zip(values, counted, strict=True)]
    average = np.median if median else np.mean
    return np.array([average(sample) if len(sample) else np.nan for sample in chosen])


def _mean_loss(losses: Tensor, *, exact: bool) -> np.ndarray:
    """The mean as `F.cross_entropy` takes it."""
    values = -losses if exact else -losses.float()
    first = torch.zeros(losses.shape[1], dtype=torch.long)
    means = [F.nll_loss(sample[:, None], first) for sample in values]
    return torch.stack(means).double().numpy()


def _agreement(top: Tensor, other: Tensor) -> Tensor:
    """1 where two top tokens are the same, 0 where they differ; −1 is no token."""
    return (top == other).double().masked_fill((top < 0) | (other < 0), torch.nan)


def token_rows(
    reader: LensReader, lenses: Sequence[LensState], words: Sequence[str], k: int
) -> Rows:
    """List the likeliest tokens at each state and position of the first sample.

    Args:
        reader: Reads the logits.
        lenses: Those that fit.
        words: The sample's tokens as strings.
        k: Tokens per state and position.

    Returns:
        The rows of the table `lens_tokens`.
    """
    names = ("kind", "state", "beyond", "pos", "input", "rank", "token")
    keys: dict[str, list[Any]] = {name: [] for name in names}
    probabilities: list[np.ndarray] = []
    numbers: list[int] = []
    for lens in lenses:
        values, ids = top_tokens(reader, lens, 0, k)
        pos, count = values.shape
        probabilities.append(values.flatten().float().numpy())
        keys["kind"] += [lens.kind] * (pos * count)
        keys["state"] += [lens.state] * (pos * count)
        keys["beyond"] += [lens.beyond] * (pos * count)
        keys["pos"] += [p for p in range(pos) for _ in range(count)]
        keys["input"] += [words[p] for p in range(pos) for _ in range(count)]
        keys["rank"] += list(range(1, count + 1)) * pos
        numbers += ids.flatten().tolist()
    keys["token"] = token_texts(reader.model.tokenizer, numbers)
    arrays = {
        name: np.array(column, dtype=object if isinstance(column[0], str) else None)
        for name, column in keys.items()
    }
    rows = Rows("lens_tokens", 1, arrays)
    rows.values["probability"][0] = np.concatenate(probabilities)
    rows.flag[0, ~np.isfinite(rows.values["probability"][0])] = Flag.NONFINITE
    return rows


__all__ = ["LensRows", "sample_means", "token_rows"]
