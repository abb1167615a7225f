"""Recorder: turns the trajectories of one model into rows, batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import flagged
from loopscope.analysis.measures.cka_estimators import ESTIMATORS, cka
from loopscope.analysis.measures.router_weights import RoutingKeys
from loopscope.analysis.measures.spectrum_ranks import (
    RANK_MEASURES,
    SPECTRUM_LENGTH,
    gram,
    ranks,
    singular_values_of_grams,
    spectrum,
)
from loopscope.analysis.measures.update_norm import relative_update
from loopscope.analysis.measuring.course import COURSE, Course
from loopscope.analysis.measuring.threads import Each
from loopscope.analysis.tables import frames as tables
from loopscope.analysis.tables.rows import Rows, columns
from loopscope.errors import InputError
from loopscope.models.trajectory import Trajectory
from loopscope.probes.readout import losses


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
        more_loops: T, iterations of the main loop to run besides its own K, for delta and readout.
    """

    measures: tuple[str, ...]
    kernels: tuple[str, ...] = ("rbf",)
    bandwidth: float = 1.0
    drop_first: int = 0
    center: bool = False
    normalize_rows: bool = False
    more_loops: int | None = None


class Recorder:
    """The tables of one model while it runs: rows of fixed number, no activations."""

    def __init__(
        self,
        first: Trajectory,
        samples: int,
        options: Options,
        *,
        loss: bool = True,
        course: Course | None = None,
    ) -> None:
        """Set aside all rows.

        Args:
            first: A trajectory of the model, for the names of its loops, states, blocks, slots
                and gates.
            samples: Number of samples.
            options: How to measure.
            loss: Whether the model predicts next tokens; if not, the table `loss` has no rows.
            course: Fills the tables `delta` and `readout`, where they are asked for.
        """
        self.options = options
        self.course = course
        self.tokens: pd.DataFrame | None = None
        self.loops = {n: _LoopRows(one, samples, options) for n, one in first.loops.items()}
        measured = "loss" in options.measures and loss
        # one loss per sample, whatever the number of loops: it is the model's
        self.loss = (first.loop, Rows("loss", samples, {})) if measured else None

    @property
    def has_routing(self) -> bool:
        """Whether any loop has routers or gates."""
        return any(one.routing.all for one in self.loops.values())

    def add(
        self, start: int, trajectory: Trajectory, each: Each, longer: Trajectory | None = None
    ) -> None:
        """Measure one batch.

        Args:
            start: Number of its first sample.
            trajectory: Its trajectory.
            each: Applies a function to each sample's number; `map`, or a pool's.
            longer: That of the model with more iterations, where it is known already.

        Raises:
            InputError: if it has not the first batch's loops and iterations.
        """
        batch, drop = len(trajectory.h_emb), self.options.drop_first
        here = slice(start, start + batch)
        loops = trajectory.loops
        self._check(loops)
        for name, one in self.loops.items():
            one.add(here, loops[name], drop)
        if set(self.options.measures) & {"cka", "spectrum", "rank"}:
            # loops share h_emb and h_out: what depends on a state alone is computed once
            home = trajectory.h_emb.device
            places = {n: [id(x) for x in one.states.values()] for n, one in loops.items()}
            states = {
                id(state): state[:, drop:].to(home)
                for one in loops.values()
                for state in one.states.values()
            }

            def geometry(i: int) -> None:
                self._geometry(start + i, {key: x[i] for key, x in states.items()}, places)

            list(each(geometry, range(batch)))
        if self.loss is not None:
            rows = self.loss[1]
            assert trajectory.tokens is not None
            found = torch.stack(losses(trajectory.logits, trajectory.tokens)).cpu().numpy()
            rows.values["value"][here, 0], rows.flag[here, 0] = flagged(found)
        if self.course is not None:
            self.course.add(here, trajectory, drop, longer)

    def token_table(self, model: str, trajectory: Trajectory, tokens: Sequence[str]) -> None:
        """Router weights of the first sample, token by token (nothing without routers).

        Args:
            model: The model's name.
            trajectory: The first batch.
            tokens: The first sample's tokens as strings.
        """
        if "routing" not in self.options.measures:
            return
        parts = [
            self.loops[name].routing.token_table(model, one, tokens)
            for name, one in trajectory.loops.items()
        ]
        there = [part for part in parts if part is not None]
        self.tokens = _stacked(there) if there else None

    def frames(self, model: str) -> dict[str, pd.DataFrame]:
        """The tables, complete once every batch was added."""
        frames: dict[str, pd.DataFrame] = {}
        course = {} if self.course is None else self.course.frames(model)
        for name in self.options.measures:
            if name in COURSE:
                parts = course.get(name, [])
            elif name == "loss":
                parts = [] if self.loss is None else [self.loss[1].frame(model, self.loss[0])]
            else:
                found = [(loop, one.rows.get(name)) for loop, one in self.loops.items()]
                parts = [rows.frame(model, loop) for loop, rows in found if rows is not None]
            frames[name] = _stacked(parts) if parts else tables.empty(name)
        if "routing" in frames:
            frames["tokens"] = tables.empty("tokens") if self.tokens is None else self.tokens
        return frames

    def _check(self, loops: dict[str, Trajectory]) -> None:
        before = {name: one.K for name, one in self.loops.items()}
        now = {name: one.K for name, one in loops.items()}
        if now != before:
            raise InputError(
                f"the first batch ran {_counts(before)} and a later one {_counts(now)}: the number "
                "of iterations depends on the text. Fix it, with loops=n or in the model's "
                "configuration; or measure texts of one number of iterations at a time."
            )

    def _geometry(
        self, sample: int, states: dict[int, Tensor], places: dict[str, list[int]]
    ) -> None:
        """CKA, spectra and ranks of one sample."""
        options = self.options
        if options.normalize_rows:
            states = {key: _unit_rows(state) for key, state in states.items()}
        products: dict[int, Tensor] = {}
        sigmas: dict[int, np.ndarray] = {}
        if spectral := bool(set(options.measures) & {"spectrum", "rank"}):
            products = {key: gram(state, center=options.center) for key, state in states.items()}
        if "cka" in options.measures:
            for name, keys in places.items():
                pos = states[keys[0]].shape[0]
                shared = spectral and all(len(products[key]) == pos for key in keys)
                found = cka(
                    [states[key] for key in keys],
                    kernels=options.kernels,
                    bandwidth=options.bandwidth,
                    grams=[products[key] for key in keys] if shared else None,
                )
                rows = self.loops[name].rows["cka"]
                pairs = [getattr(found[k], e) for k in options.kernels for e in ESTIMATORS]
                a, b = np.triu_indices(len(keys))
                rows.values["value"][sample] = np.concatenate([pair.value[a, b] for pair in pairs])
                rows.flag[sample] = np.concatenate([pair.flag[a, b] for pair in pairs])
        if spectral:
            values = singular_values_of_grams(list(products.values()))
            sigmas = dict(zip(products, values, strict=True))
            for name, keys in places.items():
                self.loops[name].add_spectra(sample, [sigmas[key] for key in keys])


class _LoopRows:
    """The rows of one loop, but those of the loss."""

    def __init__(self, first: Trajectory, samples: int, options: Options) -> None:
        self.K = first.K
        self.routing = RoutingKeys.of(first)
        states = list(first.states)
        step = {"prelude": -1, "coda": first.K} | {f"core{t + 1}": t for t in range(first.K)}
        pairs = [
            (*pair, *how)
            for how in product(options.kernels, ESTIMATORS)
            for pair in combinations_with_replacement(states, 2)
        ]
        keys = {
            "update": columns(("block", "t"), [(name, step[name]) for name in first.blocks]),
            "cka": columns(("state_a", "state_b", "kernel", "estimator"), pairs),
            "spectrum": columns(("state", "i"), product(states, range(SPECTRUM_LENGTH))),
            "rank": columns(("state", "measure"), product(states, RANK_MEASURES)),
        }
        if self.routing.all:
            keys["routing"] = columns(("kind", "t", "target"), self.routing.all)
        asked = [name for name in options.measures if name in keys]
        self.rows = {name: Rows(name, samples, keys[name]) for name in asked}

    def add(self, here: slice, trajectory: Trajectory, drop: int) -> None:
        """Updates and routing of one batch."""
        if (rows := self.rows.get("update")) is not None:
            for column, (h, f_h) in enumerate(trajectory.blocks.values()):
                value, flag = relative_update(h[:, drop:], f_h[:, drop:])
                rows.values["value"][here, column] = value
                rows.flag[here, column] = flag
        if (rows := self.rows.get("routing")) is not None:
            self.routing.fill(rows, here, trajectory, drop)

    def add_spectra(self, sample: int, sigmas: list[np.ndarray]) -> None:
        """Spectra and ranks of one sample from the singular values of its states."""
        if (rows := self.rows.get("spectrum")) is not None:
            lines = [spectrum(sigma) for sigma in sigmas]
            for column in ("sigma_rel", "log10_sigma_rel"):
                rows.values[column][sample] = np.concatenate([getattr(x, column) for x in lines])
            rows.flag[sample] = np.concatenate([line.flag for line in lines])
        if (rows := self.rows.get("rank")) is not None:
            found = [ranks(sigma) for sigma in sigmas]
            rows.values["value"][sample] = np.concatenate([rank.value for rank in found])
            rows.flag[sample] = np.concatenate([rank.flag for rank in found])


def _stacked(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return parts[0] if len(parts) == 1 else tables.stack(parts)


def _counts(loops: dict[str, int]) -> str:
    return ", ".join(f"{K} iterations of {name}" for name, K in loops.items())


def _unit_rows(state: Tensor) -> Tensor:
    state = state if state.dtype == torch.float64 else state.float()
    norm = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
    return state / torch.where(norm == 0, 1, norm)
