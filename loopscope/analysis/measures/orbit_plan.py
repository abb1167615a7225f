"""What trajectories need of all samples: which are looked at closely, components, thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.utils._pytree import tree_map

from loopscope.analysis.measures.filling import SampleSet, kept_positions
from loopscope.analysis.options import Options
from loopscope.errors import InputError
from loopscope.models import Hooked, Trajectory
from loopscope.probes import (
    jacobian_products,
    quantile_thresholds,
    readings,
    separate_iterations,
    token_paths,
)

FITTED = 8
"""Samples that components and thresholds are fitted to, evenly spaced."""

TOKENS = 64
"""Tokens of each of them whose states components are fitted to, evenly spaced."""

THRESHOLDS = 11
"""Thresholds of each rule of early exit."""

COMPONENTS = 3

RULES = ("step", "acceleration", "kl")
"""Signals that a token may stop by, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Principal components of the states of a loop.

    Attributes:
        mean: (d_model,).
        axes: (component, d_model).
        explained: Share of the variance of each.
    """

    mean: np.ndarray
    axes: np.ndarray
    explained: np.ndarray

    def of(self, states: np.ndarray) -> np.ndarray:
        """Give the coordinates of states.

        Args:
            states: (…, d_model).

        Returns:
            (…, component).
        """
        return (states - self.mean) @ self.axes.T


@dataclass(frozen=True, kw_only=True)
class OrbitPlan:
    """What is known before the first batch.

    Attributes:
        close: Numbers of the samples that are looked at closely.
        differentiated: Numbers of those whose contraction is computed.
        components: Principal components of each loop and state, in the order of
            `Trajectory.courses`; None where its states do not vary or are not alike.
        thresholds: Rule → its thresholds, ascending; empty where there are no read-outs.
        path: Where the iterations of the main loop stand, those beyond K too.
        no_contraction: Why iterations cannot be differentiated; empty where they can.
    """

    close: tuple[int, ...] = ()
    differentiated: tuple[int, ...] = ()
    components: tuple[Components | None, ...] = ()
    thresholds: Mapping[str, np.ndarray] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    no_contraction: str = ""


def spaced(count: int, total: int) -> list[int]:
    """Choose numbers evenly.

    Args:
        count: How many, at most.
        total: Of 0 … total − 1.

    Returns:
        Ascending, the first and the last among them where there are two.
    """
    return sorted({round(x) for x in np.linspace(0, total - 1, min(count, total)).tolist()})


def make_plan(
    model: Hooked, samples: SampleSet, options: Options, longer: Hooked | None
) -> OrbitPlan:
    """Look at a few samples before the first is measured.

    Args:
        model: The model.
        samples: All of them.
        options: How to measure.
        longer: The model with more iterations of its main loop, or None.

    Returns:
        The plan; an empty one for a model without a loop.
    """
    if model.K == 0:
        return OrbitPlan()
    settings: Any = options.orbit
    runner = model if longer is None else longer
    readable = options.loss is None and samples.tokens is not None and not model.why_no_loss()
    states: dict[str, list[np.ndarray]] = {}
    signals: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
    for number in spaced(FITTED, len(samples)):
        batch = on_device(samples.batch(range(number, number + 1)), model.input_device)
        trajectory = runner.capture(batch, memory=False)
        for name, loop in trajectory.courses.items():
            if alike(loop.h):
                states.setdefault(name, []).append(_some_tokens(loop, options.drop_first))
        if readable:
            cheap = model.reads_out_cheaply
            reader = runner if cheap else model
            for rule, signal in exit_signals(reader, trajectory, 0, model.K)[1].items():
                signals[rule].append(signal.flatten())
    components = [
        _components(np.concatenate(states[name])) if name in states else None
        for name in trajectory.courses
    ]
    thresholds = {
        rule: quantile_thresholds(torch.cat(parts), THRESHOLDS).numpy()
        for rule, parts in signals.items()
        if parts
    }
    reason = ""
    if settings.contraction_samples:
        reason = _why_no_contraction(runner, batch, trajectory)
    return OrbitPlan(
        path=trajectory.path,
        no_contraction=reason,
        close=tuple(spaced(settings.close_samples, len(samples))),
        differentiated=tuple(spaced(settings.contraction_samples, len(samples))),
        components=tuple(components),
        thresholds={rule: values for rule, values in thresholds.items() if len(values)},
    )


def exit_signals(
    model: Hooked, trajectory: Trajectory, sample: int, K: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give what each token's loss would be after t loops, and the signals that it may stop by.

    Args:
        model: The model that reads states out; it runs as many loops as the trajectory has, or K.
        trajectory: With tokens, of K or more iterations.
        sample: Which sample of its batch.
        K: Iterations of the model itself; those beyond are read only where that is cheap.

    Returns:
        Losses of every t, (T + 1, pos − 1), and of each rule what is known after iteration
        t = 1 … T, (T, pos − 1); none where a state cannot be read out in place of h(K).
    """
    h = trajectory.h if model.reads_out_cheaply else trajectory.h[: K + 1]
    tokens = trajectory.tokens
    if tokens is None or not alike(h) or h[0].shape[1] != tokens.shape[1]:
        return torch.empty(0), {}
    some = slice(sample, sample + 1)
    with torch.no_grad():
        logits = [next(iter(model.read_out_logits(x[some], tokens[some]))) for x in h]
        read = readings(logits, tokens[sample])
        path = token_paths([widened(x[some]) for x in h])
    signals = {"step": path.size, "acceleration": path.acceleration}
    by_rule = {rule: signal[0, :-1].T for rule, signal in signals.items()}
    return read.loss, {**by_rule, "kl": read.kl}


def widened(state: Tensor) -> Tensor:
    """Give a state in the dtype that it is measured in.

    Args:
        state: In any floating dtype.

    Returns:
        float64 states as they are, others in float32.
    """
    return state if state.dtype == torch.float64 else state.float()


def alike(h: Sequence[Tensor]) -> bool:
    """Tell whether states can be compared.

    Args:
        h: States.

    Returns:
        Whether all have one shape.
    """
    return all(x.shape == h[0].shape for x in h)


def on_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to where a model's inputs belong.

    Args:
        batch: Tokens, or items.
        device: Where to.

    Returns:
        The same form.
    """
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def _why_no_contraction(model: Hooked, inputs: Any, trajectory: Trajectory) -> str:
    """Why an iteration has no products with its Jacobian, in one line; empty where it has."""
    try:
        shape = trajectory.h[0].shape
        for iteration in separate_iterations(model, inputs, trajectory.path, shape):
            forward, backward = jacobian_products(iteration)
            forward(torch.zeros_like(iteration.h))
            backward(torch.zeros_like(iteration.after))
    except (InputError, RuntimeError, NotImplementedError) as error:
        return str(error).strip().split("\n")[0].rstrip(".")
    return ""


def _some_tokens(loop: Trajectory, drop: int) -> np.ndarray:
    """States of a few tokens of a sample, (token · t, d_model)."""
    h = torch.stack([kept_positions(x, drop, loop)[0].to(loop.h[0].device) for x in loop.h])
    some = h[:, spaced(TOKENS, h.shape[1])]
    return some.flatten(0, 1).double().cpu().numpy()


def _components(states: np.ndarray) -> Components | None:
    """Principal components; None where states are not finite or do not vary."""
    if not np.isfinite(states).all():
        return None
    count = min(COMPONENTS, *states.shape)
    if np.ptp(states, axis=0).max() == 0:
        return None
    fit = PCA(n_components=count, svd_solver="full" if states.shape[1] <= 512 else "randomized",
              random_state=0).fit(states)  # fmt: skip
    return Components(mean=fit.mean_, axes=fit.components_, explained=fit.explained_variance_ratio_)
