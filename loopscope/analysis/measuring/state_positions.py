"""States whose positions are not the tokens: latents, routed subsets, pooled ones; what is said."""

from collections.abc import Mapping
from typing import Any

from loopscope.analysis.measures import kept_positions
from loopscope.analysis.options import Options
from loopscope.models import Trajectory


def position_notes(first: Trajectory, options: Options) -> list[str]:
    """Say which states have other positions than the sample has tokens, and what follows.

    Args:
        first: The trajectory of a batch.
        options: How it is measured.

    Returns:
        A sentence for each loop that has such states.
    """
    notes = []
    for name, loop in first.loops.items():
        other = {
            state: h.shape[1] for state, h in loop.states.items() if h.shape[1] != loop.positions
        }
        if not other:
            continue
        numbers = dict.fromkeys(other.values())
        states = {n: [state for state, pos in other.items() if pos == n] for n in numbers}
        words = "; ".join(f"{n} in {', '.join(of_number)}" for n, of_number in states.items())
        note = (
            f"positions: {loop.positions} of a sample, in {name} {words}; what compares states of "
            "different numbers is withheld (flag shape), those of one number are taken as of the "
            "same positions"
        )
        if options.drop_first:
            note += f"; the first {options.drop_first} are left out only where there are as many "
            note += "as tokens"
        notes.append(note)
    return notes


def state_shapes(first: Trajectory, drop: int, *, always: bool) -> Mapping[str, Any]:
    """Tell the shape of h(K), where it does not follow from tokens and d_model.

    Args:
        first: The trajectory of a batch.
        drop: Tokens left out.
        always: Whether nothing else tells how many positions there are.

    Returns:
        `states`: loop → (positions, width), as the provenance keeps it; empty where all are as of
        the tokens.
    """
    shapes = {
        name: list(kept_positions(loop.h[-1], drop, loop).shape[1:])
        for name, loop in first.loops.items()
        if always or loop.h[-1].shape[1] != loop.positions
    }
    return {"states": shapes} if shapes else {}
