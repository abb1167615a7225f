"""Mixing: what the model's own code makes of h_m(t) before it is the next state."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from loopscope.models.loops.loop_map import Loop, LoopMap
from loopscope.models.loops.ports import equal, value_at
from loopscope.models.loops.tracing import Trace

CLOSE = 1e-3
"""How near a mixture of states must come to the next state, in parts of its norm."""


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
                "each position)"
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
    if any(following.shape != given.shape for _, following, given in pairs):
        return None
    if not all(torch.isfinite(state).all() for state in (*h, *h_m)):
        return ""
    formulas: set[str] = set()
    names: list[str] = []
    for t, following, given in reversed(pairs):  # at t = 0 several states are the same
        parts = {
            "h_m(t)": given,
            "h(t)": h[t],
            "h(0)": h[0],
            "h_emb": value_at(trace, loop_map.embed),
        }
        if loop_map.prelude:
            parts["the prelude's output"] = value_at(trace, loop_map.prelude[-1].h_m)
        terms = _sum(following, parts, names)
        if terms is None:
            return None
        names = list(terms)
        formulas.add(" + ".join(_term(weight, name) for name, weight in terms.items()))
    formulas.discard("h_m(t)")
    return " or ".join(sorted(formulas))


def _sum(state: Tensor, parts: dict[str, Tensor], names: Sequence[str]) -> dict[str, float] | None:
    """The shortest weighted sum of some tensors that is a state: that of the names, or another."""
    target = state.double().cpu().flatten()
    columns = {
        name: part.double().cpu().flatten()
        for name, part in parts.items()
        if part.shape == state.shape and part.any()
    }
    choices = [list(names)] if names and columns.keys() >= set(names) else []
    for size in range(1, len(columns) + 1):
        sized = [list(chosen) for chosen in combinations(columns, size)]
        choices += sorted(sized, key=lambda chosen: "h_m(t)" not in chosen)
    for chosen in choices:
        weights = _weights(target, [columns[name] for name in chosen])
        if weights is not None:
            return dict(zip(chosen, weights, strict=True))
    return None


def _weights(target: Tensor, columns: Sequence[Tensor]) -> list[float] | None:
    basis = torch.stack(list(columns), dim=1)
    scale = basis.norm(dim=0)
    solution = torch.linalg.lstsq(basis / scale, target[:, None]).solution[:, 0]
    rest = target - (basis / scale) @ solution
    if not rest.norm() <= CLOSE * target.norm():
        return None
    return (solution / scale).tolist()


def _term(weight: float, name: str) -> str:
    return name if abs(weight - 1) < CLOSE else f"{weight:.3g}·{name}"
