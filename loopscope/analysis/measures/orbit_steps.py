"""Orbit steps: how the states of each loop, and of each layer of its core, move."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analysis.flags import Flag
from loopscope.analysis.measures.exit_curves import ExitCurves
from loopscope.analysis.measures.filling import (
    Batch,
    MeasureRows,
    SampleSet,
    Setup,
    kept_positions,
)
from loopscope.analysis.measures.head_drift import HeadDrift
from loopscope.analysis.measures.orbit_plan import OrbitPlan, alike, make_plan, widened
from loopscope.analysis.measures.path_components import PathComponents
from loopscope.analysis.options import Options
from loopscope.analysis.tables import Rows, columns, renumbered, stack
from loopscope.models import Hooked, Trajectory
from loopscope.probes import (
    LEAST_STATES,
    activations,
    directions,
    jacobian_products,
    largest_singular_value,
    of_directions,
    path_kinds,
    pattern_names,
    separate_iterations,
    start_vector,
    state_hooks,
    stream_names,
    token_paths,
)

CORE = "core"
VIEWS = ("state", "direction")


class OrbitRows(MeasureRows):
    """The tables `orbit`, `attention_drift`, `orbit_path` and `early_exit`."""

    @classmethod
    def prepare(
        cls,
        model: Hooked,
        samples: SampleSet,
        options: Options,
        *,
        batch_size: int,
        longer: Hooked | None = None,
    ) -> OrbitPlan:
        return make_plan(model, samples, options, longer)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.plan: OrbitPlan = setup.prepared.get("orbit") or OrbitPlan()
        self.model, self.longer = setup.model, setup.longer
        self.options: Any = setup.options.orbit
        self.start = setup.start
        self.main = setup.first.loop
        here = range(setup.start, setup.start + setup.samples)
        self.close = [n - setup.start for n in self.plan.close if n in here]
        self.differentiated: list[int] = [
            n - setup.start for n in self.plan.differentiated if n in here
        ]
        self.notes: list[str] = []
        self.rows: dict[str, Rows] = {}
        self.layers: dict[int, Rows] = {}
        self.parts: list[HeadDrift | PathComponents | ExitCurves] = []
        if setup.first.K == 0:
            self.note = (
                "orbit: the model has no loop, so its tables have no rows (a plain stack; a layout "
                "groups its layers into virtual blocks)"
            )
            return
        beyond = self.longer is not None and len(self.plan.path) == self.longer.K
        self.runner = runner = self.longer if beyond and self.longer is not None else self.model
        depth = {name: loop.K for name, loop in setup.first.courses.items()}
        depth[self.main] = runner.K
        self.rows = {name: _path_rows((CORE,), K, setup.samples) for name, K in depth.items()}
        self.path = self.plan.path if beyond else setup.first.path
        if self.plan.no_contraction:
            self.differentiated = []
        self.streams = stream_names(runner, self.path) if self.close else {}
        if runner.K >= 2:
            self.layers = {
                layer: _path_rows((f"layer{layer}",), runner.K - 1, len(self.close))
                for layer in self.streams
            }
        patterns = pattern_names(runner, self.path) if self.close else {}
        self.drift = HeadDrift(patterns, self.close, self.main)
        self.exits = ExitCurves(setup, self.plan, self.close)
        self.components = PathComponents(setup, self.plan)
        self._say(setup, patterns)
        self.note = f"orbit: {'; '.join(self.notes)}" if self.notes else ""

    def _say(self, setup: Setup, patterns: Mapping[int, Sequence[str]]) -> None:
        """What is missing, and on how many samples the costly parts rest."""
        say = self.notes.append
        total = setup.samples
        if len(self.plan.close) < total or len(self.plan.differentiated) < total:
            say(
                f"layers, attention and early exits of {len(self.plan.close)} samples, contraction "
                f"of {len(self.plan.differentiated)} ({self.options.power_steps} steps of the "
                "power iteration)"
            )
        if self.close and not self.streams:
            say("no layer of the core has a stream at every iteration, so there are no layers")
        if self.close and not patterns:
            say("no attention patterns are at hand, so attention_drift has no rows")
        if self.exits.why_not:
            say(f"early_exit has no rows: {self.exits.why_not}")
        if self.plan.no_contraction:
            say(f"no contraction: {self.plan.no_contraction}")
        if self.differentiated and not state_hooks(self.model, setup.first.path)[1]:
            say("contraction is that of what the core is given: what makes h(t) is not known")

    def add(self, batch: Batch) -> None:
        for name, rows in self.rows.items():
            whole = batch.trajectory.courses[name]
            if name == self.main and self.runner is not self.model and batch.longer is not None:
                whole = batch.longer
            self._fill(rows, batch.samples, whole.h, batch.drop, batch.trajectory, whole=whole)
        if not self.rows:
            return
        self._contract(batch)
        self.exits.add(batch)
        self.components.add(batch)
        for sample, inputs, row in _chosen(batch, self.close):
            self._look_closely(sample, inputs, row, batch)

    def _fill(
        self,
        rows: Rows,
        samples: slice,
        h: Sequence[Tensor],
        drop: int,
        like: Trajectory,
        *,
        whole: Trajectory | None = None,
    ) -> None:
        """Steps and kinds of the states of some samples."""
        if not alike(h):
            rows.flag[samples] = Flag.SHAPE
            return
        home = h[0].device
        states = [widened(kept_positions(x, drop, like)).to(home) for x in h]
        T = len(states) - 1
        if whole is not None and ends_elsewhere(whole):
            self.remark(
                "something is added to the state before each iteration that h(K) is without, so "
                "paths end at h(K−1) (of more loops: the last but one)"
            )
            states = states[:-1]
        for number, view in enumerate(VIEWS):
            seen = states if view == "state" else directions(states)
            block = slice(number * (T + 1), (number + 1) * (T + 1))
            values, flag = path_values(seen)
            for column, numbers in values.items():
                rows.values[column][samples, block][:, : len(states)] = numbers
            rows.flag[samples, block] = Flag.SHAPE
            rows.flag[samples, block][:, : len(states)] = flag

    def remark(self, note: str) -> None:
        """Say what was noticed, once.

        Args:
            note: The line.
        """
        if (line := f"orbit: {note}") not in self.remarks:
            self.remarks.append(line)

    def _contract(self, batch: Batch) -> None:
        """The contraction of each iteration, of the samples chosen for it."""
        rows, T = self.rows[self.main], self.runner.K
        h = (batch.trajectory if self.runner is self.model else batch.longer or batch.trajectory).h
        for sample, inputs, row in _chosen(batch, self.differentiated):
            values = contractions(
                self.runner, inputs, self.path, row, steps=self.options.power_steps,
                seed=self.start + sample, shape=(_size(inputs, h[0]), *h[0].shape[1:]),
            )  # fmt: skip
            for number, _ in enumerate(VIEWS):
                start = number * (T + 1)
                rows.values["contraction"][sample, start : start + T] = values[number]

    def _look_closely(self, sample: int, inputs: Any, row: int, batch: Batch) -> None:
        """Layers and attention patterns of one sample."""
        names = [*_all(self.streams.values()), *_all(self.drift.names.values())]
        kept = activations(self.runner, inputs, list(dict.fromkeys(names)))
        place = self.close.index(sample)
        for layer, rows in self.layers.items():
            if not all(name in kept for name in self.streams[layer]):
                rows.flag[place] = Flag.NONFINITE
                continue
            h = [kept[name][row : row + 1] for name in self.streams[layer]]
            self._fill(rows, slice(place, place + 1), h, batch.drop, batch.trajectory)
        self.drift.add(place, kept, row, lambda x: batch.kept(x))

    def frames(self, model: str) -> dict[str, list[pd.DataFrame]]:
        if not self.rows:
            return {name: [] for name in ("orbit", "attention_drift", "orbit_path", "early_exit")}
        orbit = [rows.frame(model, loop) for loop, rows in self.rows.items()]
        if self.close:
            orbit += [
                renumbered(rows.frame(model, self.main), self.close)
                for rows in self.layers.values()
            ]
        return {
            "orbit": orbit if len(orbit) == 1 else [stack(orbit)],
            "attention_drift": self.drift.frames(model),
            "orbit_path": self.components.frames(model),
            "early_exit": self.exits.frames(model),
        }


def ends_elsewhere(loop: Trajectory) -> bool:
    """Tell whether h(K) is another kind of state than h(t) before it.

    Args:
        loop: A loop's trajectory.

    Returns:
        Whether h(K) is the core's output and each earlier state that with something added to it
        (an input injected before the core), so that their difference is no step.
    """
    if loop.K < 2 or not alike((*loop.h, *loop.h_m)):
        return False
    outputs = [h_m.to(h.device) for h_m, h in zip(loop.h_m, loop.h[1:], strict=True)]
    same = [torch.equal(h_m, h) for h_m, h in zip(outputs, loop.h[1:], strict=True)]
    return same[-1] and not any(same[:-1])


def path_values(h: Sequence[Tensor]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Average the paths of the tokens of each sample.

    Args:
        h: h(0) … h(T), each (batch, pos, d_model), of one shape, float32 or float64.

    Returns:
        Column of `orbit` → (batch, T + 1) in float64, NaN where it does not exist, and flags: what
        is not finite where a state beside it is not, zero where no token has a relative step.
    """
    T = len(h) - 1
    finite = torch.stack([torch.isfinite(x).flatten(1).all(1) for x in h], 1)  # (batch, T + 1)
    sound = finite.clone()
    sound[:, 1:] &= finite[:, :-1]
    sound[:, :-1] &= finite[:, 1:]
    whole = finite.all(1)
    path = token_paths(h)
    values = {
        name: _mean(getattr(path, name))
        for name in ("size", "cosine", "acceleration", "to_last", "to_limit")
    }
    limits = torch.isfinite(path.to_limit).double().mean(1) >= 0.5
    values["to_limit"] = values["to_limit"].where(limits, torch.nan)
    values["rate"] = path.rate.double()
    if T + 1 >= LEAST_STATES:
        for name, share in zip(("settles", "orbits", "drifts"), path_kinds(h), strict=True):
            values[name] = share.double().mean(1, keepdim=True).expand(-1, T + 1)
    for name in ("to_last", "to_limit", "settles", "orbits", "drifts"):
        if name in values:
            values[name] = values[name].where(whole[:, None], torch.nan)
    filled = {}
    for name, value in values.items():
        numbers = np.full((len(h[0]), T + 1), np.nan)
        numbers[:, : value.shape[1]] = value.where(sound[:, : value.shape[1]], torch.nan).cpu()
        numbers[~np.isfinite(numbers)] = np.nan
        filled[name] = numbers
    flag = np.full((len(h[0]), T + 1), int(Flag.NONE), dtype=np.int8)
    flag[:, :T][np.isnan(filled["size"][:, :T])] = Flag.ZERO
    flag[~sound.cpu().numpy()] = Flag.NONFINITE
    return filled, flag


def contractions(
    model: Hooked,
    inputs: Any,
    path: Sequence[str],
    row: int,
    *,
    steps: int,
    seed: int,
    shape: Sequence[int],
) -> np.ndarray:
    """Compute the largest singular value of each iteration's Jacobian, in both views.

    Args:
        model: The model.
        inputs: What it is given.
        path: Where its iterations stand.
        row: Which sample of the inputs.
        steps: Steps of the power iteration.
        seed: Of its start.
        shape: Of a state of the inputs.

    Returns:
        (view, t); NaN where a state is not finite.
    """
    values = np.full((len(VIEWS), len(path)), np.nan)
    for t, iteration in enumerate(separate_iterations(model, inputs, path, shape)):
        both = jacobian_products(iteration)
        start = start_vector(iteration.h, [seed] * len(iteration.h))
        for number, view in enumerate(VIEWS):
            if view == "direction" and iteration.h.shape[-1] != iteration.after.shape[-1]:
                continue
            maps = both if view == "state" else of_directions(iteration, both)
            values[number, t] = largest_singular_value(*maps, start, steps=steps)[row].item()
    return values


def _path_rows(parts: Sequence[str], T: int, samples: int) -> Rows:
    places = [(part, view, t) for part in parts for view in VIEWS for t in range(T + 1)]
    return Rows("orbit", samples, columns(("part", "view", "t"), places))


def _mean(values: Tensor) -> Tensor:
    """Mean over the tokens that have a value, (batch, iter), in float64 where there is that."""
    wide = values if values.device.type == "mps" else values.double()
    return wide.nanmean(1)


def _chosen(batch: Batch, numbers: Iterable[int]) -> Iterable[tuple[int, Any, int]]:
    """Samples of a batch that were chosen: number, inputs of the model, and place in them."""
    for sample in numbers:
        if batch.samples.start <= sample < batch.samples.stop:
            place = sample - batch.samples.start
            if isinstance(batch.inputs, Tensor):
                yield sample, batch.inputs[place : place + 1], 0
            else:  # items are stacked leaf by leaf
                yield sample, batch.inputs, place


def _size(inputs: Any, h: Tensor) -> int:
    """Samples of some inputs, of items as many as of the batch that they are."""
    return len(inputs) if isinstance(inputs, Tensor) else len(h)


def _all(names: Iterable[Sequence[str]]) -> list[str]:
    return [name for of_layer in names for name in of_layer]
