"""Drafts: the loops of a sequence of units, before their boundaries are settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loopscope.errors import InputError
from loopscope.models.loops.folding import Leaf, Node, Run, Sequence_, fold, runs_in
from loopscope.models.loops.tracing import Call
from loopscope.models.loops.units import Units


@dataclass
class Span:
    """One iteration while boundaries are sought: the first and last of its units."""

    first: int
    last: int


@dataclass
class Draft:
    """A loop while boundaries are sought.

    Attributes:
        runs: Its iterations, one list per run of the enclosing loop.
        parent: The enclosing loop.
        units: The sequence that the spans count in.
        name: What it is called, once all are known.
        notes: What a user should know of it.
    """

    units: Units
    runs: list[list[Span]]
    parent: "Draft | None" = None
    name: str = ""
    notes: list[str] = field(default_factory=list)

    def calls(self, span: Span) -> list[Call]:
        """The calls of an iteration.

        Args:
            span: The iteration.

        Returns:
            Its units, in order.
        """
        return self.units.calls[span.first : span.last + 1]

    def spans(self) -> list[Span]:
        """All iterations in execution order."""
        return [span for run in self.runs for span in run]


def draft_loops(units: Units, single: bool) -> tuple[list[Draft], list[str]]:
    """Find the loops in a sequence of units.

    Args:
        units: The units.
        single: Whether all that repeats must be one loop, as where the core was named.

    Returns:
        The loops, an outer one before those in it, and the symbols that repeat outside of them.
    """
    leaves = [(units.symbol(c), i) for i, c in enumerate(units.calls) if units.is_core(c)]
    nodes = fold([s for s, _ in leaves], [i for _, i in leaves])
    top = [node for node in nodes if isinstance(node, Run)]
    if single and (len(top) != 1 or len(nodes) != 1):
        top = [_by_first(nodes)] if leaves else []
    drafts: list[Draft] = []
    for run in top:
        _add(units, [(None, run)], None, drafts)
    looped = {leaf.symbol for run in top for leaf in run.leaves()}
    rest = [str(s) for s, _ in leaves if s not in looped]
    return drafts, list(dict.fromkeys(rest))


def _by_first(nodes: list[Node]) -> Run:
    """Iterations that begin wherever the first symbol of the core does."""
    leaves = [leaf for node in nodes for leaf in node.leaves()]
    starts = [i for i, leaf in enumerate(leaves) if leaf.symbol == leaves[0].symbol]
    ends = [*starts[1:], len(leaves)]
    bodies = [tuple(leaves[a:b]) for a, b in zip(starts, ends, strict=True)]
    return Run(tuple(Sequence_("body", body) for body in bodies))


def _add(
    units: Units, runs: list[tuple[Any, Run]], parent: Draft | None, drafts: list[Draft]
) -> None:
    """Note a loop with all its runs, then the loops inside its bodies."""
    draft = Draft(units, [[_span(body) for body in run.bodies] for _, run in runs], parent)
    drafts.append(draft)
    bodies = [body for _, run in runs for body in run.bodies]
    inner: dict[Any, list[tuple[Any, Run]]] = {}
    for number, body in enumerate(bodies):
        for run in runs_in(body):
            inner.setdefault(run.key, []).append((number, run))
    for numbered in inner.values():
        _add(units, numbered, draft, drafts)
    if not inner:
        _add_inside(units, draft, drafts)


def _add_inside(units: Units, draft: Draft, drafts: list[Draft]) -> None:
    """Note the loops inside the calls that the core repeats."""
    first = [units.calls[i] for i in range(draft.runs[0][0].first, draft.runs[0][0].last + 1)]
    for place, call in enumerate(first):
        if not units.is_core(call) or units.inside(call) is None:
            continue
        flat = replace(units, repeated=set(), calls=[])
        runs: list[tuple[Any, Run]] = []
        for number, span in enumerate(draft.spans()):
            if span.first + place > span.last:
                continue
            inner = units.inside(units.calls[span.first + place])
            if inner is None:
                return
            flat.repeated |= inner.repeated
            offset = len(flat.calls)
            flat.calls += inner.calls
            leaves = [(inner.symbol(c), i) for i, c in enumerate(inner.calls) if inner.is_core(c)]
            nodes = fold([s for s, _ in leaves], [i + offset for _, i in leaves])
            runs += [(number, node) for node in nodes if isinstance(node, Run)][:1]
        if runs:
            _add(flat, runs, draft, drafts)


def _span(body: Node) -> Span:
    places = [leaf.index for leaf in body.leaves() if isinstance(leaf, Leaf)]
    return Span(min(places), max(places))


def listed(units: Units, iterations: Sequence[Sequence[str]]) -> list[Draft]:
    """The loop whose iterations a specification lists one by one.

    Args:
        units: The units.
        iterations: Names of the modules of each.

    Returns:
        The one loop.

    Raises:
        InputError: for modules that do not run in that order.
    """
    spans, place = [], 0
    for names in iterations:
        indices: list[int] = []
        for name in names:
            later = (i for i in range(place, len(units.calls)) if units.calls[i].module == name)
            index = next(later, None)
            if index is None:
                raise InputError(
                    f"{name} of the iteration {', '.join(names)} of the specification does not run "
                    "there: list the modules of each iteration in the order in which they run."
                )
            indices.append(index)
            place = index + 1
        spans.append(Span(indices[0], indices[-1]))
    return [Draft(units, [spans])]
