"""The fitted reading: what brings h(t) to where the coda expects h(K), fitted on other windows.

Samples are shared between two folds, documents whole. What is fitted on some windows of one fold
reads the other, so that every sample is read by what has not seen it, and no text is set aside.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loopscope.analysis.measuring.sample_items import Items, to_device
from loopscope.analysis.measuring.token_windows import TokenWindows
from loopscope.errors import InputError
from loopscope.models import Hooked
from loopscope.probes import (
    RIDGE,
    RidgeMap,
    RidgeSums,
    fold_of_samples,
    losses,
    read_out_losses,
)

TOKENS_PER_DIRECTION = 32
"""A map is fitted on so many tokens for each direction of the state, where there are as many."""

MEMORY = 2**32
"""Bytes that the sums of a pass may take; of more states, further passes are made."""

REFIT_TOKENS = 2**14
"""Tokens that a coda is refitted on, at most."""

REFIT_RATE, REFIT_BATCH = 3e-4, 8


@dataclass(frozen=True, kw_only=True)
class FittedReading:
    """What each fold's windows are read by.

    Attributes:
        model: The model.
        folds: Fold of each sample.
        maps: For each fold the maps of h(0) … h(K−1), fitted on the other fold.
        codas: For each fold the refitted parameters of the coda, for h(0) … h(K); None where the
            coda stays as it is.
        windows: Windows that each fold's maps were fitted on.
    """

    model: Hooked
    folds: Sequence[int]
    maps: tuple[Sequence[RidgeMap | None], ...]
    codas: tuple[Sequence[Mapping[str, Tensor]], ...] | None = None
    windows: tuple[int, ...]

    @property
    def refits(self) -> bool:
        """Whether the coda is fitted too, for every state."""
        return self.codas is not None

    @torch.no_grad()
    def losses(self, tokens: Tensor, h: Tensor, t: int, samples: slice) -> list[Tensor]:
        """Give the loss of each sample when h(t) is read by what was fitted on the other fold.

        Args:
            tokens: The tokens, (batch, pos).
            h: h(t) of these samples, (batch, pos, d_model).
            t: Which state it is.
            samples: Their numbers.

        Returns:
            Nats per token, one number per sample; NaN where nothing could be fitted.
        """
        of_batch = torch.tensor(self.folds[samples])
        by_sample: dict[int, Tensor] = {}
        for fold in (0, 1):
            rows = (of_batch == fold).nonzero()[:, 0]
            if not len(rows):
                continue
            part, ids = h[rows.to(h.device)], tokens[rows.to(tokens.device)]
            brought = self._bring(fold, part, t)
            values = [part.new_full((), torch.nan)] * len(rows)
            if brought is not None and self.codas is None:
                values = read_out_losses(self.model, ids, brought)
            elif brought is not None and self.codas is not None:
                values = _refitted_losses(self.model, self.codas[fold][t], brought, ids)
            by_sample |= dict(zip(rows.tolist(), values, strict=True))
        return [by_sample[i] for i in range(len(of_batch))]

    @torch.no_grad()
    def brought(self, h: Tensor, t: int, samples: slice) -> tuple[Tensor, list[bool]]:
        """Bring h(t) to where the coda expects h(K), by the maps fitted on the other fold.

        Args:
            h: h(t) of these samples, (batch, pos, d_model).
            t: Which state it is.
            samples: Their numbers.

        Returns:
            The state, and whether a map could be fitted for each sample.
        """
        of_batch = torch.tensor(self.folds[samples])
        moved, fitted = h.clone(), [True] * len(of_batch)
        for fold in (0, 1):
            rows = (of_batch == fold).nonzero()[:, 0]
            part = self._bring(fold, h[rows.to(h.device)], t)
            if part is not None:
                moved[rows.to(h.device)] = part
            else:
                fitted = [f and int(of_batch[i]) != fold for i, f in enumerate(fitted)]
        return moved, fitted

    def _bring(self, fold: int, h: Tensor, t: int) -> Tensor | None:
        if t == len(self.maps[fold]):  # h(K)
            return h
        brought = self.maps[fold][t]
        return None if brought is None else brought(h)

    def record(self) -> dict[str, Any]:
        """What provenance keeps of it, as JSON values."""
        return {"folds": 2, "windows": list(self.windows), "ridge": RIDGE}


def fitted_reading(
    model: Hooked,
    samples: TokenWindows | Items,
    *,
    batch_size: int,
    refit: int = 0,
) -> FittedReading | None:
    """Fit the maps of all states of a model's main loop, on both folds.

    Args:
        model: A model with a loop whose states can be read out.
        samples: All samples.
        batch_size: Samples per forward pass.
        refit: Steps of refitting the coda to each state, on top of its map; 0 leaves it. Of windows
            of tokens alone.

    Returns:
        What to read by; None where the samples make no two folds.

    Raises:
        InputError: where the coda is to be refitted and has no parameters of its own.
    """
    documents = samples.documents or [None] * len(samples)
    folds = fold_of_samples(documents, samples.keys)
    if not (0 in folds and 1 in folds):
        return None
    first = _inputs(model, samples, range(1))
    _, pos, width = model.capture(first, memory=False, logits=False).h[0].shape
    pos = pos if samples.tokens is None else samples.tokens.shape[1]
    need = TOKENS_PER_DIRECTION * width
    chosen = [_chosen(folds, 1 - fold, need, pos) for fold in (0, 1)]
    maps = tuple(_fit(model, samples.chosen(rows), width, batch_size) for rows in chosen)
    codas = None
    if refit and samples.tokens is not None:
        codas = tuple(
            _refit(model, samples.tokens[rows], maps[fold], batch_size, refit)
            for fold in (0, 1)
            for rows in [_chosen(folds, 1 - fold, REFIT_TOKENS, pos)]
        )
    counts = tuple(len(rows) for rows in chosen)
    return FittedReading(model=model, folds=folds, maps=maps, codas=codas, windows=counts)


def _inputs(model: Hooked, samples: TokenWindows | Items, numbers: range) -> Any:
    """A batch as the model takes it."""
    batch = samples.batch(numbers)
    return batch if samples.tokens is not None else to_device(batch, model.input_device)


def _chosen(folds: Sequence[int], fold: int, need: int, pos: int) -> list[int]:
    """The windows of one fold to fit on: its first, which are of as many documents as can be."""
    rows = [i for i, of_sample in enumerate(folds) if of_sample == fold]
    return rows[: max(1, -(-need // pos))]


def _fit(
    model: Hooked, samples: TokenWindows | Items, width: int, batch_size: int
) -> list[RidgeMap | None]:
    """The maps of h(0) … h(K−1), in as many passes as memory asks for."""
    at_once = max(1, MEMORY // (2 * 8 * width**2))
    maps: list[RidgeMap | None] = []
    for first in range(0, model.K, at_once):
        sums = [RidgeSums() for _ in range(first, min(first + at_once, model.K))]
        for begin in range(0, len(samples), batch_size):
            numbers = range(begin, min(begin + batch_size, len(samples)))
            h = model.capture(_inputs(model, samples, numbers), memory=False, logits=False).h
            for t, of_state in enumerate(sums, start=first):
                if h[t].shape == h[-1].shape:
                    of_state.add(h[t], h[-1])
        solved = [of_state.solve() for of_state in sums]
        maps += [None if ridge is None else ridge.kept() for ridge in solved]
    return maps


# -- a coda of each state's own --------------------------------------------------------------------


class _Reader(nn.Module):
    """The coda and the head as a module: states → logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        return torch.stack(list(self.model.read_out_logits(h, tokens)))


def _refitted_losses(
    model: Hooked, coda: Mapping[str, Tensor], h: Tensor, tokens: Tensor
) -> list[Tensor]:
    logits = functional_call(_Reader(model), dict(coda), (h, tokens))
    return losses(logits, tokens)


def _refit(
    model: Hooked,
    tokens: Tensor,
    maps: Sequence[RidgeMap | None],
    batch_size: int,
    steps: int,
) -> list[dict[str, Tensor]]:
    """The coda's parameters after some steps on each of h(0) … h(K), the same batches for all."""
    begin = {f"model.{name}": value for name, value in model.coda_parameters().items()}
    if half := {value.dtype for value in begin.values()} - {torch.float32, torch.float64}:
        raise InputError(
            f"the coda cannot be refitted in {str(half.pop()).removeprefix('torch.')}; load the "
            "model with dtype float32, or leave refit_coda (--refit-coda) out."
        )
    if not begin:
        raise InputError(
            "the coda cannot be refitted: the model has no parameters that only what follows the "
            "loop uses; leave refit_coda (--refit-coda) out."
        )
    captured = [
        model.capture(batch, memory=False, logits=False).h for batch in tokens.split(batch_size)
    ]
    codas = []
    for t in range(model.K + 1):
        h = torch.cat([states[t].cpu() for states in captured])
        brought = h if t == model.K else None if (ridge := maps[t]) is None else ridge(h)
        kept: dict[str, Tensor] = dict(begin)
        codas.append(kept if brought is None else _trained(model, begin, brought, tokens, steps))
    return codas


def _trained(
    model: Hooked, begin: Mapping[str, Tensor], h: Tensor, tokens: Tensor, steps: int
) -> dict[str, Tensor]:
    reader = _Reader(model)
    with torch.enable_grad():
        coda = {name: value.detach().clone().requires_grad_() for name, value in begin.items()}
        optimizer = torch.optim.Adam(coda.values(), lr=REFIT_RATE)
        for rows in _batches(len(tokens), steps):
            home = next(iter(coda.values())).device
            ids = tokens[rows].to(home)
            logits = functional_call(reader, coda, (h[rows].to(home), ids))
            loss = torch.stack(losses(logits, ids)).mean()
            # not backward(): the model's own parameters would keep gradients
            gradients = torch.autograd.grad(loss, list(coda.values()), allow_unused=True)
            for value, gradient in zip(coda.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
    return {name: value.detach() for name, value in coda.items()}


def _batches(count: int, steps: int) -> Iterator[Tensor]:
    """Numbers of windows for each step, drawn with a seed of their own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randperm(count, generator=generator)[:REFIT_BATCH]


__all__ = ["FittedReading", "fitted_reading"]
