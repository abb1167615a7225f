"""Filling: what a measure works from, and how it turns trajectories into rows of its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.measures.gram_matrices import (
    gram,
    singular_values_of_grams,
    within_range,
)
from loopscope.analysis.measures.scoring import NextTokens, Scoring, StateMaps
from loopscope.analysis.options import Options
from loopscope.analysis.tables import MEASURED, Rows, columns
from loopscope.models import Hooked, Trajectory


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a measure knows before the first batch is recorded.

    Attributes:
        model: The model.
        options: How to measure.
        first: The trajectory of the first batch, for the names of its loops, states, blocks, slots
            and gates.
        samples: Number of samples.
        words: The tokens of the first sample as strings, where this part has it.
        longer: The model with more iterations of its main loop, or None.
        no_loss: Why the model predicts no next token; empty where it does.
        unread: Why h(t) cannot be read out in place of h(K); empty where it can.
        start: Number of the first sample among those that `maps` knows.
        maps: For the fitted reading: what brings h(t) to where h(K) would be; None without.
        scoring: Gives the losses.
        no_logits: Why there are no logits of next tokens; empty where there are (for the measures
            that need them).
        prepared: Measure → what its `prepare` gave.
    """

    model: Hooked
    options: Options
    first: Trajectory
    samples: int
    words: Sequence[str] | None = None
    longer: Hooked | None = None
    no_loss: str = ""
    unread: str = ""
    start: int = 0
    maps: StateMaps | None = None
    scoring: Scoring = field(default_factory=NextTokens)
    no_logits: str = ""
    prepared: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class SampleSet(Protocol):
    """All samples of a model: windows of tokens, or items."""

    @property
    def tokens(self) -> Tensor | None:
        """Ids (samples, pos); None for items."""

    @property
    def documents(self) -> Sequence[str | None]:
        """The document of each, None where unknown; empty for items without."""

    @property
    def keys(self) -> Sequence[Any]:
        """Something of each sample that is equal for equal ones."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, numbers: range) -> Any:
        """Give some of the samples as the model takes them.

        Args:
            numbers: Which.

        Returns:
            Token ids (batch, pos), or a collated batch of items, not yet on the model's device.
        """


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch, as a measure sees it.

    Attributes:
        samples: The numbers of its samples in the tables.
        trajectory: Its trajectory, with logits where a measure needs them.
        longer: The trajectory of the model with more iterations, where there is one.
        drop: Tokens to leave out at the start of each sample.
        inputs: What the model was given.
    """

    samples: slice
    trajectory: Trajectory
    longer: Trajectory | None
    drop: int
    inputs: Any = None

    def kept(self, state: Tensor) -> Tensor:
        """Leave out the first tokens of a state, or of what a router gives.

        Args:
            state: (batch, pos, …); latents and other states of fewer positions than the sample has
                tokens have none of them to leave out.

        Returns:
            The rest.
        """
        return kept_positions(state, self.drop, self.trajectory)


def kept_positions(state: Tensor, drop: int, trajectory: Trajectory) -> Tensor:
    """Leave out the first tokens of a state, as `Batch.kept` does.

    Args:
        state: (batch, pos, …).
        drop: How many tokens.
        trajectory: The trajectory that it is of.

    Returns:
        The rest; all where it has fewer positions than the sample has tokens.
    """
    return state[:, drop:] if state.shape[1] >= trajectory.positions else state


@dataclass(frozen=True)
class LoopStates:
    """The states of one loop in one sample.

    Attributes:
        states: Each (pos, d_model), in the order of the trajectory's `states`; at another scale
            where its squares would not fit into float64.
        products: Gram matrices of all of them, X Xᵀ or the smaller Xᵀ X, where they are at hand.
        sigmas: Their singular values, where asked for.
    """

    states: list[Tensor]
    products: list[Tensor] | None = None
    sigmas: list[np.ndarray] = field(default_factory=list)

    @property
    def grams(self) -> list[Tensor] | None:
        """Gram matrices X Xᵀ of all states, where those are at hand."""
        if self.products is None:
            return None
        pairs = zip(self.products, self.states, strict=True)
        by_tokens = all(len(product) == len(state) for product, state in pairs)
        return self.products if by_tokens else None

    def chosen(self, numbers: Sequence[int]) -> "LoopStates":
        """Give some of the states.

        Args:
            numbers: Their places.

        Returns:
            The same of those states alone, without singular values.
        """
        products = None if self.products is None else [self.products[n] for n in numbers]
        return LoopStates([self.states[n] for n in numbers], products)


class SampleStates:
    """The states of all loops in one sample: what depends on a state alone is computed once.

    Loops share h_emb and h_out, and measures share Gram matrices and singular values.
    """

    def __init__(
        self,
        states: Mapping[int, Tensor],
        loops: Mapping[str, Sequence[int]],
        options: Options,
        *,
        spectral: bool,
    ) -> None:
        """Take the states of a sample.

        Args:
            states: Each state once, (pos, d_model), under any number.
            loops: Loop → the numbers of its states, in order.
            options: How to measure.
            spectral: Whether some measure wants singular values.
        """
        unit = options.normalize_rows
        # What is measured of a state does not change with its scale.
        self._states = {
            n: _unit_rows(state) if unit else within_range(state)[0] for n, state in states.items()
        }
        self._loops, self._center, self._spectral = loops, options.center, spectral

    def of_loop(self, loop: str) -> LoopStates:
        """Give the states of one loop.

        Args:
            loop: Its name.

        Returns:
            The states, with Gram matrices and singular values where some measure wants those.
        """
        numbers = self._loops[loop]
        states = [self._states[n] for n in numbers]
        if not self._spectral:
            return LoopStates(states)
        products = [self._grams[n] for n in numbers]
        return LoopStates(states, products, [self._sigmas[n] for n in numbers])

    @cached_property
    def _grams(self) -> dict[int, Tensor]:
        return {n: gram(state, center=self._center) for n, state in self._states.items()}

    @cached_property
    def _sigmas(self) -> dict[int, np.ndarray]:
        sigmas = singular_values_of_grams(list(self._grams.values()))
        return dict(zip(self._grams, sigmas, strict=True))


class MeasureRows:
    """The rows of one measure while a model runs: of fixed number, no activations.

    A measure fills them batch by batch (`add`), or sample by sample on several threads
    (`add_sample`, with `by_sample`).

    Attributes:
        by_sample: Whether `add_sample` is to be called.
        spectral: Whether it wants the singular values of the states.
        note: Why its table has no rows, or lacks some; empty where all is there.
        remarks: What was noticed while rows were filled, a sentence each.
    """

    by_sample: ClassVar[bool] = False
    spectral: ClassVar[bool] = False

    @classmethod
    def prepare(
        cls,
        model: Hooked,
        samples: SampleSet,
        options: Options,
        *,
        batch_size: int,
        longer: Hooked | None = None,
    ) -> Any:
        """Do once what needs all samples, such as a fit, before the first of them is measured.

        Args:
            model: The model.
            samples: All samples that it is measured on, whatever part comes first.
            options: How to measure.
            batch_size: Samples per forward pass.
            longer: The model with more iterations of its main loop, or None.

        Returns:
            What the rows find in `Setup.prepared`; None where nothing needs all samples.
        """
        return None

    def __init__(self, setup: Setup) -> None:
        """Set aside all rows.

        Args:
            setup: What there is to know before the first batch.
        """
        self.note = ""
        self.remarks: list[str] = []

    def add(self, batch: Batch) -> None:
        """Fill the rows of one batch.

        Args:
            batch: The batch.
        """

    def add_sample(self, sample: int, states: SampleStates) -> None:
        """Fill the rows of one sample; samples come on several threads.

        Args:
            sample: Its number.
            states: Its states.
        """

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        """Give the tables, complete once every batch was added.

        Args:
            model: The model's name.

        Returns:
            Table → its parts, one below the other.
        """
        raise NotImplementedError


class LoopRows(MeasureRows):
    """A measure with one table that has rows for each loop.

    Attributes:
        table: The table's name.
        rows: The rows of each loop.
    """

    table: ClassVar[str]

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        names = list(MEASURED[self.table].keys)
        self.rows: dict[str, Rows] = {}
        for name, loop in setup.first.courses.items():
            if keys := self.keys(loop, setup):
                self.rows[name] = Rows(self.table, setup.samples, columns(names, keys))

    def keys(self, loop: Trajectory, setup: Setup) -> list[tuple[Any, ...]]:
        """List what tells the rows of one sample apart.

        Args:
            loop: One loop of the first batch.
            setup: What there is to know before.

        Returns:
            The values of the table's key columns, row by row; none for a loop without rows.
        """
        raise NotImplementedError

    def add(self, batch: Batch) -> None:
        for name, rows in self.rows.items():
            self.fill(rows, batch, batch.trajectory.courses[name])

    def fill(self, rows: Rows, batch: Batch, loop: Trajectory) -> None:
        """Fill the rows of one loop in one batch.

        Args:
            rows: The loop's rows.
            batch: The batch.
            loop: Its trajectory of this loop.
        """

    def add_sample(self, sample: int, states: SampleStates) -> None:
        for name, rows in self.rows.items():
            self.fill_sample(rows, sample, states.of_loop(name))

    def fill_sample(self, rows: Rows, sample: int, loop: LoopStates) -> None:
        """Fill the rows of one loop in one sample.

        Args:
            rows: The loop's rows.
            sample: The sample's number.
            loop: Its states of this loop.
        """

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        return {self.table: [rows.frame(model, loop) for loop, rows in self.rows.items()]}


def _unit_rows(state: Tensor) -> Tensor:
    rows = state.to(torch.float64)
    largest = rows.abs().amax(-1, keepdim=True)  # squares of float64 may not fit
    rows = rows / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows = rows / torch.where(norm == 0, 1, norm)
    return rows if state.dtype == torch.float64 else rows.float()
