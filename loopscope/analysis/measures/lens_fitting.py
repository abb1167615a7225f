"""Fitting the tuned lens: each half of the samples is read by maps fitted on the other half."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopscope.analysis.measures.filling import SampleSet
from loopscope.models import Hooked
from loopscope.probes import (
    TunedFold,
    TunedLens,
    brought,
    fingerprint,
    fit_maps,
    fold_of_samples,
    sample_hashes,
    training_tokens,
    why_no_logit_lens,
)
from loopscope.provenance import commit, versions


@dataclass(frozen=True, kw_only=True)
class FittedLens:
    """The tuned lens of a model on its samples.

    Attributes:
        lens: The maps; None where none could be fitted.
        hashes: Of each sample, from `sample_hashes`.
        why_not: Why there are no maps; empty where there are.
    """

    lens: TunedLens | None = None
    hashes: Sequence[frozenset[str]] = ()
    why_not: str = ""

    def bring(self, state: Tensor, name: str, samples: slice) -> Tensor:
        """Bring a state to where h_out would be, each sample by maps fitted on others.

        Args:
            state: The state of some samples, (batch, pos, d_model).
            name: Which state it is.
            samples: Their numbers among all.

        Returns:
            (batch, pos, d_out); NaN in samples that every map was fitted on.
        """
        assert self.lens is not None
        return brought(self.lens, state, name, self.hashes[samples])


def fitted_lens(
    model: Hooked, samples: SampleSet, folder: str | Path | None, *, batch_size: int
) -> FittedLens:
    """Fit the tuned lens of a model, or read the one that its folder holds.

    Args:
        model: The model.
        samples: All samples.
        folder: Where maps are kept; None keeps none.
        batch_size: Samples per forward pass.

    Returns:
        What the tuned lens reads by.

    Raises:
        InputError: for a file in the folder that holds no maps of this model.
    """
    if samples.tokens is None or (why_not := model.why_no_loss()):
        reason = "the samples are no tokens" if samples.tokens is None else why_not
        return FittedLens(why_not=reason)
    documents = samples.documents or [None] * len(samples)
    hashes = [
        sample_hashes(key, document) for key, document in zip(samples.keys, documents, strict=True)
    ]
    path = None
    if folder is not None:
        path = Path(folder) / _file_name(model)
        if path.exists():
            return FittedLens(lens=TunedLens.load(path, model), hashes=hashes)
    fold_of = fold_of_samples(documents, samples.keys)
    if not (0 in fold_of and 1 in fold_of):
        return FittedLens(why_not="it takes two samples that differ, one to fit on")
    trajectory = model.capture(samples.tokens[:1], memory=False, logits=True)
    if why_not := why_no_logit_lens(model, trajectory):
        return FittedLens(why_not=why_not)
    if not model.unembeds_alone(samples.tokens[:1]):
        return FittedLens(why_not="the final norm and the unembedding do not run by themselves")
    folds, windows = [], []
    for fold in (0, 1):
        rows = [i for i, of_sample in enumerate(fold_of) if of_sample == fold]
        known = frozenset().union(*(hashes[i] for i in rows))
        rows, states, h_out = _training_states(model, samples.tokens, rows, batch_size)
        maps, losses = fit_maps(model, states, h_out, samples.tokens[:1])
        folds.append(TunedFold(maps, known, losses))
        windows.append(len(rows))
    provenance = {
        "model": str(model.name), "windows": windows, "tokens": samples.tokens.shape[1],
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    lens = TunedLens(tuple(folds), fingerprint(model), provenance)
    if path is not None:
        lens.save(path)
    return FittedLens(lens=lens, hashes=hashes)


def _file_name(model: Hooked) -> str:
    """A name for the maps of these weights, told from those of others."""
    name = re.sub(r"[^\w.+@-]+", "-", str(model.name))[-60:]
    return f"{name}-{fingerprint(model)[:8]}.safetensors"


def _training_states(
    model: Hooked, tokens: Tensor, rows: list[int], batch_size: int
) -> tuple[list[int], dict[str, Tensor], Tensor]:
    """The states before h_out, and h_out, at the tokens of some windows; and which windows."""
    width = model.config.d_model
    rows = rows[: -(-training_tokens(width, model.K + 2) // tokens.shape[1])]
    parts: dict[str, list[Tensor]] = {}
    for begin in range(0, len(rows), batch_size):
        trajectory = model.capture(tokens[rows[begin : begin + batch_size]], memory=False)
        for name, state in trajectory.states.items():
            if state.shape[:2] == trajectory.h_out.shape[:2]:
                parts.setdefault(name, []).append(state.to(trajectory.h_out.device).flatten(0, 1))
    states = {name: torch.cat(part) for name, part in parts.items()}
    h_out = states.pop("h_out")
    return rows, states, h_out


__all__ = ["FittedLens", "fitted_lens"]
