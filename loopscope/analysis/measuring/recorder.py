"""Recorder: turns the trajectories of one model into rows, batch by batch."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from loopscope.analysis.measures import Batch, MeasureRows, SampleStates, Setup, kept_positions
from loopscope.analysis.tables import BY_NAME, empty, stack
from loopscope.errors import InputError
from loopscope.models import Trajectory

Each = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]
"""Applies a function to the number of each sample: `map`, or a pool's."""


@contextmanager
def one_thread_per_sample() -> Iterator[Each]:
    """A `map` over samples on as many threads as torch may use, each computing on one.

    The matrices of a sample are too small to be shared between threads, and numpy's and torch's
    threads get in each other's way: several samples at a time are much faster.
    """
    threads = torch.get_num_threads()
    with threadpool_limits(1, user_api="blas"):
        if threads == 1:
            yield map
            return
        try:
            with ThreadPoolExecutor(
                threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                yield pool.map
        finally:  # the number is one per thread, but new threads take the last that was set
            torch.set_num_threads(threads)


class Recorder:
    """The tables of one model while it runs: rows of fixed number, no activations.

    Attributes:
        options: How to measure.
        counts: Iterations of each loop in the first batch; every batch must have them.
        measures: Those asked for, by name.
    """

    def __init__(self, setup: Setup) -> None:
        """Set aside all rows.

        Args:
            setup: What there is to know before the first batch.
        """
        self.options = setup.options
        self.counts = _counts(setup.first)
        self.measures = {name: rows_of(name)(setup) for name in setup.options.measures}
        self._by_sample = [rows for rows in self.measures.values() if rows.by_sample]
        self._spectral = any(rows.spectral for rows in self._by_sample)

    def notes(self, *, longer: bool) -> list[str]:
        """Tell why tables have no rows.

        Args:
            longer: Of the measures that use more iterations, or of the others.

        Returns:
            A sentence for each.
        """
        return [
            rows.note
            for name, measure in BY_NAME.items()
            if measure.longer == longer and (rows := self.measures.get(name)) and rows.note
        ]

    def remarks(self) -> list[str]:
        """Tell what measures noticed while they were filled.

        Returns:
            A sentence for each.
        """
        return [remark for rows in self.measures.values() for remark in rows.remarks]

    def add(
        self,
        start: int,
        trajectory: Trajectory,
        each: Each,
        longer: Trajectory | None = None,
        inputs: Any = None,
    ) -> None:
        """Measure one batch.

        Args:
            start: Number of its first sample.
            trajectory: Its trajectory.
            each: Applies a function to each sample's number, as `one_thread_per_sample` gives it.
            longer: That of the model with more iterations, where there is one.
            inputs: What the model was given.

        Raises:
            InputError: if it has not the first batch's loops and iterations.
        """
        self._check(trajectory)
        size, drop = len(trajectory.h_emb), self.options.drop_first
        batch = Batch(
            samples=slice(start, start + size), trajectory=trajectory, longer=longer, drop=drop,
            inputs=inputs,
        )  # fmt: skip
        for rows in self.measures.values():
            rows.add(batch)
        if self._by_sample:
            self._add_samples(start, trajectory, each)

    def _add_samples(self, start: int, trajectory: Trajectory, each: Each) -> None:
        """What is measured sample by sample, several at a time."""
        loops, drop = trajectory.courses, self.options.drop_first
        device = trajectory.h_emb.device
        # loops share h_emb and h_out: what depends on a state alone is computed once
        numbers = {name: [id(h) for h in loop.states.values()] for name, loop in loops.items()}
        states = {
            id(h): kept_positions(h, drop, trajectory).to(device)
            for loop in loops.values()
            for h in loop.states.values()
        }

        def add(i: int) -> None:
            of_sample = {number: h[i] for number, h in states.items()}
            sample = SampleStates(of_sample, numbers, self.options, spectral=self._spectral)
            for rows in self._by_sample:
                rows.add_sample(start + i, sample)

        list(each(add, range(len(trajectory.h_emb))))

    def frames(self, model: str) -> dict[str, pd.DataFrame]:
        """Give the tables, complete once every batch was added.

        Args:
            model: The model's name.

        Returns:
            Each table by name, without rows where there is nothing to measure.
        """
        return {
            table: _stacked(parts) if parts else empty(table)
            for rows in self.measures.values()
            for table, parts in rows.frames(model).items()
        }

    def _check(self, trajectory: Trajectory) -> None:
        if (counts := _counts(trajectory)) != self.counts:
            raise InputError(
                f"the first batch ran {_in_words(self.counts)} and a later one "
                f"{_in_words(counts)}: the number of iterations depends on the text. Measure "
                "texts of one number of iterations at a time."
            )


def rows_of(measure: str) -> type[MeasureRows]:
    """Get the class that fills the rows of a measure.

    Args:
        measure: Its name.

    Returns:
        The class.
    """
    module, _, name = BY_NAME[measure].rows.partition(":")
    rows: type[MeasureRows] = getattr(import_module(f"loopscope.analysis.measures.{module}"), name)
    return rows


def _stacked(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return parts[0] if len(parts) == 1 else stack(parts)


def _counts(trajectory: Trajectory) -> dict[str, int]:
    return {name: loop.K for name, loop in trajectory.courses.items()}


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{K} iterations of {name}" for name, K in counts.items())
