"""Mixing: what the model's own code makes of h_m(t) before it is the next state."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from loopscope.models.loops.loop_map import Loop, LoopMap
from loopscope.models.loops.ports import equal, value_at
from loopscope.models.loops.tracing import Trace

CLOSE = 1e-4
"""How near a sum of states must come to the next state, in parts of its norm."""


def with_mixing(trace: Trace, loop_map: LoopMap) -> LoopMap:
    """A map that says how each loop's next state follows from its iteration's output.

    Sums of h_m(t), h(t), h(0), h_emb and the prelude's output are recognised, with weights that are
    the same at every position; so is a MeSH cycle.

    Args:
        trace: The traced forward pass.
        loop_map: Its map, with routers.

    Returns:
        The map, with a note for every loop whose states are something else.
    """
    loops, notes = [], list(loop_map.state_notes)
    for loop in loop_map.loops:
        mixing = (
            "" if loop_map.mesh_cycle and loop is loop_map.main else _mixing(trace, loop_map, loop)
        )
        if mixing is None:
            notes.append(
                f"h(t) of {loop.name} is not h_m(t-1), and no sum of the states before: the "
                "model's own code changes the state between iterations (a norm, noise, weights of "
                "each position), or the two are different states"
            )
        loops.append(replace(loop, mixing=mixing or ""))
    return replace(loop_map, loops=tuple(loops), state_notes=tuple(notes))


def _mixing(trace: Trace, loop_map: LoopMap, loop: Loop) -> str | None:
    """The next state as a sum, empty where it is h_m(t) itself; None where it is neither."""
    h = [value_at(trace, it.h) for it in loop.iterations]
    h_m = [value_at(trace, it.h_m) for it in loop.iterations]
    if loop.after.shape == h_m[-1].shape:
        h.append(value_at(trace, loop.after))
    runs = [it.path.rpartition(".")[0] for it in loop.iterations]
    runs.append(runs[-1])  # in each run of an inner loop
    pairs = [(t, h[t + 1], h_m[t]) for t in range(len(h) - 1) if runs[t] == runs[t + 1]]
    if all(equal(following, given) for _, following, given in pairs):
        return ""
    if len(pairs) > 1 and equal(*pairs[-1][1:]):  # what follows the loop reads the output itself
        pairs.pop()
    if any(following.shape != given.shape for _, following, given in pairs):
        return None
    if not all(torch.isfinite(state).all() for state in (*h, *h_m)):
        return ""
    sums = [
        (
            following,
            {"h_m(t)": given, "h(t)": h[t], "h(0)": h[0]} | _around(trace, loop_map),
        )
        for t, following, given in pairs
    ]
    fits = [len(_columns(parts)) for _, parts in sums]
    reference = sums[fits.index(max(fits))]  # at t = 0 several states are the same
    terms = _sum(*reference)
    if terms is None:
        return None
    if not all(_holds(following, parts, terms) for following, parts in sums):
        if any(_sum(following, parts) is None for following, parts in sums):
            return None
        return "a sum of states, with other weights in each iteration"
    return " + ".join(_term(weight, name) for name, weight in terms.items())


def _around(trace: Trace, loop_map: LoopMap) -> dict[str, Tensor]:
    """What stands before the loop, and may be added in each iteration."""
    parts = {"h_emb": value_at(trace, loop_map.embed)}
    if loop_map.prelude:
        parts["the prelude's output"] = value_at(trace, loop_map.prelude[-1].h_m)
    return parts


def _columns(parts: dict[str, Tensor]) -> list[Tensor]:
    """The tensors that differ."""
    columns: list[Tensor] = []
    for part in parts.values():
        if not any(equal(part, other) for other in columns):
            columns.append(part)
    return columns


def _sum(state: Tensor, parts: dict[str, Tensor]) -> dict[str, float] | None:
    """The shortest weighted sum of some tensors that is a state."""
    target = state.double().cpu().flatten()
    columns = {
        name: part.double().cpu().flatten()
        for name, part in parts.items()
        if part.shape == state.shape and part.any()
    }
    for size in range(1, len(columns) + 1):
        sized = [list(chosen) for chosen in combinations(columns, size)]
        for chosen in sorted(sized, key=lambda names: "h_m(t)" not in names):
            weights = _weights(target, [columns[name] for name in chosen], _close(state))
            if weights is not None:
                return dict(zip(chosen, weights, strict=True))
    return None


def _holds(state: Tensor, parts: dict[str, Tensor], terms: dict[str, float]) -> bool:
    """Whether a sum with these weights is a state."""
    if any(parts[name].shape != state.shape for name in terms):
        return False
    target = state.double().cpu()
    total = torch.zeros_like(target)
    for name, weight in terms.items():
        total += weight * parts[name].double().cpu()
    return bool((target - total).norm() <= _close(state) * target.norm())


def _close(state: Tensor) -> float:
    return CLOSE if torch.finfo(state.dtype).eps < 1e-4 else 4 * torch.finfo(state.dtype).eps


def _weights(target: Tensor, columns: Sequence[Tensor], close: float) -> list[float] | None:
    basis = torch.stack(list(columns), dim=1)
    scale = basis.norm(dim=0)
    solution = torch.linalg.lstsq(basis / scale, target[:, None]).solution[:, 0]
    rest = target - (basis / scale) @ solution
    if not rest.norm() <= close * target.norm():
        return None
    return (solution / scale).tolist()


def _term(weight: float, name: str) -> str:
    return name if abs(weight - 1) < 1e-3 else f"{weight:.3g}·{name}"
