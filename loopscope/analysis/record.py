"""Recorder: turns the trajectories of one model into rows, batch by batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from loopscope.analysis import tables
from loopscope.analysis.cka import ESTIMATORS, cka
from loopscope.analysis.flags import Flag, flagged
from loopscope.analysis.routing import (
    alpha_exists,
    alpha_sources,
    alpha_statistics,
    router_statistics,
)
from loopscope.analysis.rows import Rows
from loopscope.analysis.spectrum import (
    RANK_MEASURES,
    SPECTRUM_LENGTH,
    gram,
    ranks,
    singular_values_of_grams,
    spectrum,
)
from loopscope.analysis.threads import Each
from loopscope.analysis.update import relative_update
from loopscope.probes.capture import Trajectory


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        measures: Which of `measure.MEASURES`.
        kernels: Kernels of the CKA.
        bandwidth: t of the RBF kernel, as a fraction of sqrt(median(d²)).
        drop_first: Tokens left out at the start of each sample (in all tables but loss and tokens).
        center: Subtract each state's mean over the tokens before spectrum and ranks.
        normalize_rows: Scale each token's state to norm 1 before CKA, spectrum and ranks.
    """

    measures: tuple[str, ...]
    kernels: tuple[str, ...] = ("rbf",)
    bandwidth: float = 1.0
    drop_first: int = 0
    center: bool = False
    normalize_rows: bool = False


class Recorder:
    """The tables of one model while it runs: rows of fixed number, no activations."""

    def __init__(self, first: Trajectory, samples: int, options: Options) -> None:
        """Set aside all rows.

        Args:
            first: A trajectory of the model, for the names of its states, blocks and slots.
            samples: Number of samples.
            options: How to measure.
        """
        self.options = options
        self.has_slots = first.w_write is not None and first.transition is not None
        self.tokens: pd.DataFrame | None = None
        keys = _row_keys(first, options)
        if not self.has_slots:
            keys.pop("routing", None)
        self.rows = {name: Rows(name, samples, columns) for name, columns in keys.items()}

    def add(self, start: int, trajectory: Trajectory, each: Each) -> None:
        """Measure one batch.

        Args:
            start: Number of its first sample.
            trajectory: Its trajectory.
            each: Applies a function to each sample's number; `map`, or a pool's.
        """
        batch, drop = len(trajectory.h_emb), self.options.drop_first
        here = slice(start, start + batch)
        if (rows := self.rows.get("update")) is not None:
            for column, (h, f_h) in enumerate(trajectory.blocks.values()):
                value, flag = relative_update(h[:, drop:], f_h[:, drop:])
                rows.values["value"][here, column] = value
                rows.flag[here, column] = flag
        if "routing" in self.rows:
            self._routing(here, trajectory, drop)
        if self.rows.keys() & {"cka", "spectrum", "rank"}:
            states = [state[:, drop:] for state in trajectory.states.values()]

            def geometry(i: int) -> None:
                self._geometry(start + i, [state[i] for state in states])

            list(each(geometry, range(batch)))
        if (rows := self.rows.get("loss")) is not None:
            rows.values["value"][here, 0], rows.flag[here, 0] = flagged(_losses(trajectory))

    def frames(self, model: str) -> dict[str, pd.DataFrame]:
        """The tables, complete once every batch was added."""
        frames = {name: rows.frame(model) for name, rows in self.rows.items()}
        if "routing" in self.options.measures:
            frames.setdefault("routing", tables.empty("routing"))
            frames["tokens"] = tables.empty("tokens") if self.tokens is None else self.tokens
        return frames

    def _geometry(self, sample: int, states: list[Tensor]) -> None:
        """CKA, spectra and ranks of one sample."""
        options = self.options
        if options.normalize_rows:
            states = [_unit_rows(state) for state in states]
        spectral = bool(self.rows.keys() & {"spectrum", "rank"})
        products = [gram(state, center=options.center) for state in states] if spectral else []
        if (rows := self.rows.get("cka")) is not None:
            pos = states[0].shape[0]
            shared = spectral and all(len(p) == pos for p in products)
            found = cka(
                states,
                kernels=options.kernels,
                bandwidth=options.bandwidth,
                grams=products if shared else None,
            )
            pairs = [getattr(found[k], e) for k in options.kernels for e in ESTIMATORS]
            a, b = np.triu_indices(len(states))
            rows.values["value"][sample] = np.concatenate([pair.value[a, b] for pair in pairs])
            rows.flag[sample] = np.concatenate([pair.flag[a, b] for pair in pairs])
        if not spectral:
            return
        sigmas = singular_values_of_grams(products)
        if (rows := self.rows.get("spectrum")) is not None:
            lines = [spectrum(sigma) for sigma in sigmas]
            for column in ("sigma_rel", "log10_sigma_rel"):
                rows.values[column][sample] = np.concatenate([getattr(x, column) for x in lines])
            rows.flag[sample] = np.concatenate([line.flag for line in lines])
        if (rows := self.rows.get("rank")) is not None:
            found_ranks = [ranks(sigma) for sigma in sigmas]
            rows.values["value"][sample] = np.concatenate([rank.value for rank in found_ranks])
            rows.flag[sample] = np.concatenate([rank.flag for rank in found_ranks])

    def _routing(self, here: slice, trajectory: Trajectory, drop: int) -> None:
        """Means and entropies of all routers, then α."""
        rows, column = self.rows["routing"], 0
        cycles = _cycles(trajectory)
        for w in (router[:, drop:] for kind in cycles for router in cycles[kind].unbind(2)):
            mean, entropy = router_statistics(w)
            columns = slice(column, column := column + w.shape[-1])
            rows.values["mean"][here, columns] = mean.value
            rows.values["entropy"][here, columns] = entropy.value[:, None]
            rows.flag[here, columns] = np.maximum(mean.flag, entropy.flag[:, None])
        alpha = alpha_statistics(cycles["write"][:, drop:], cycles["read"][:, drop:])
        exists = alpha_exists(trajectory.K)
        rows.values["mean"][here, column:] = alpha.value[:, exists]
        rows.flag[here, column:] = alpha.flag[:, exists]

    def token_table(self, model: str, trajectory: Trajectory, tokens: Sequence[str]) -> None:
        """Router weights of the first sample, token by token (nothing without routers).

        Args:
            model: The model's name.
            trajectory: The first batch.
            tokens: The first sample's tokens as strings.
        """
        if "routing" not in self.rows:
            return
        cycles = {kind: w[0] for kind, w in _cycles(trajectory).items()}  # (pos, cycle, slot)
        pos, steps, slots = cycles["write"].shape
        keys = list(
            product(cycles, range(-1, steps - 1), [f"m{b}" for b in range(slots)], range(pos))
        )
        columns = _columns(("kind", "t", "target", "pos"), keys)
        columns["token"] = np.array(tokens, dtype=object)[columns["pos"]]
        rows = Rows("tokens", 1, columns)
        values = [w.permute(1, 2, 0).reshape(-1).float().cpu().numpy() for w in cycles.values()]
        rows.values["value"][0] = np.concatenate(values)
        rows.flag[0, ~np.isfinite(rows.values["value"][0])] = Flag.NONFINITE
        self.tokens = rows.frame(model)


def _row_keys(first: Trajectory, options: Options) -> dict[str, dict[str, np.ndarray]]:
    """What tells the rows of one sample apart, for each table asked for."""
    states, steps = list(first.states), range(-1, first.K)
    step = {"prelude": -1, "coda": first.K} | {f"core{t + 1}": t for t in range(first.K)}
    cka_keys = [
        (*pair, *how)
        for how in product(options.kernels, ESTIMATORS)
        for pair in combinations_with_replacement(states, 2)
    ]
    exists = alpha_exists(first.K)
    sources = alpha_sources(first.K)
    slots = range(first.w_write[0].shape[-1]) if first.w_write else ()
    routing_keys = [
        (kind, t, f"m{b}") for kind in ("write", "read") for t in steps for b in slots
    ] + [("alpha", int(row) - 1, sources[source]) for row, source in np.argwhere(exists)]
    keys = {
        "update": _columns(("block", "t"), [(name, step[name]) for name in first.blocks]),
        "cka": _columns(("state_a", "state_b", "kernel", "estimator"), cka_keys),
        "spectrum": _columns(("state", "i"), product(states, range(SPECTRUM_LENGTH))),
        "rank": _columns(("state", "measure"), product(states, RANK_MEASURES)),
        "routing": _columns(("kind", "t", "target"), routing_keys),
        "loss": {},
    }
    return {name: keys[name] for name in options.measures}


def _columns(names: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    return dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))


def _cycles(trajectory: Trajectory) -> dict[str, Tensor]:
    """Write and read weights of all cycles, the transitional one first: (batch, pos, K+1, slot)."""
    start, write, read = trajectory.transition, trajectory.w_write, trajectory.w_read
    assert start is not None and write is not None and read is not None
    return {
        "write": torch.stack([start.w_write, *write], dim=2),
        "read": torch.stack([start.w_read, *read], dim=2),
    }


def _unit_rows(state: Tensor) -> Tensor:
    state = state if state.dtype == torch.float64 else state.float()
    norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
    return state / torch.where(norm == 0, 1, norm)


def _losses(trajectory: Trajectory) -> np.ndarray:
    """Mean next-token cross-entropy of each sample, in nats."""
    logits, tokens = trajectory.logits, trajectory.tokens
    assert logits is not None and tokens is not None
    pairs = zip(logits, tokens, strict=True)
    return np.array([F.cross_entropy(x[:-1].float(), y[1:]).item() for x, y in pairs])
