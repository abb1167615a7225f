"""Drafts: the loops of a sequence of units, before their boundaries are settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loopscope.errors import InputError
from loopscope.models.loops.carried_states import CarriedState, carried_states
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
        doubts: What its states may not be.
        carried: The states that calls among its units update, where they are several.
    """

    units: Units
    runs: list[list[Span]]
    parent: "Draft | None" = None
    name: str = ""
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    carried: list[CarriedState] = field(default_factory=list)

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


def draft_loops(
    units: Units, single: bool, states: Sequence[str] = ()
) -> tuple[list[Draft], list[str]]:
    """Find the loops in a sequence of units.

    Args:
        units: The units.
        single: Whether all that repeats must be one loop, as where the core was named.
        states: The state that each call of the core updates in one iteration, as a specification
            says.

    Returns:
        The loops, an outer one before those in it, and the symbols that repeat outside of them.

    Raises:
        InputError: if the core is not called as often as the states ask for.
    """
    core = [i for i, call in enumerate(units.calls) if units.is_core(call)]
    carried = carried_states(units, [units.calls[i] for i in core], states)
    leaves = [(_symbol(units, units.calls[i], carried), i) for i in core]
    nodes = fold([s for s, _ in leaves], [i for _, i in leaves])
    top = [node for node in nodes if isinstance(node, Run)]
    if single and (len(top) != 1 or len(nodes) != 1):
        top = [_by_first(nodes)] if leaves else []
    drafts: list[Draft] = []
    for run in top:
        _add(units, [(None, run)], None, drafts, carried)
    looped = {leaf.symbol for run in top for leaf in run.leaves()}
    rest = [units.symbol(units.calls[i]) for s, i in leaves if s not in looped]
    return drafts, list(dict.fromkeys(rest))


def _symbol(units: Units, call: Call, carried: Sequence[CarriedState]) -> tuple[str, int]:
    """What makes two calls calls of the same thing: the module, and which state they update."""
    state = next((n for n, state in enumerate(carried) if call in state.calls), -1)
    return units.symbol(call), state


def _by_first(nodes: list[Node]) -> Run:
    """Iterations that begin wherever the first symbol of the core does."""
    leaves = [leaf for node in nodes for leaf in node.leaves()]
    starts = [i for i, leaf in enumerate(leaves) if leaf.symbol == leaves[0].symbol]
    ends = [*starts[1:], len(leaves)]
    bodies = [tuple(leaves[a:b]) for a, b in zip(starts, ends, strict=True)]
    return Run(tuple(Sequence_("body", body) for body in bodies))


def _add(
    units: Units,
    runs: list[tuple[Any, Run]],
    parent: Draft | None,
    drafts: list[Draft],
    carried: list[CarriedState],
) -> None:
    """Note a loop with all its runs, then the loops inside its bodies."""
    spans = [[_span(body) for body in run.bodies] for _, run in runs]
    draft = Draft(units, spans, parent, carried=carried)
    drafts.append(draft)
    bodies = [body for _, run in runs for body in run.bodies]
    inner: dict[Any, list[tuple[Any, Run]]] = {}
    for number, body in enumerate(bodies):
        for run in runs_in(body):
            inner.setdefault(run.key, []).append((number, run))
    for numbered in inner.values():
        _add(units, numbered, draft, drafts, carried)
    if not inner:
        _add_inside(units, draft, drafts)


def _add_inside(units: Units, draft: Draft, drafts: list[Draft]) -> None:
    """Note the loops inside the calls that the core repeats."""
    first = [units.calls[i] for i in range(draft.runs[0][0].first, draft.runs[0][0].last + 1)]
    for place, call in enumerate(first):
        if not units.is_core(call) or units.inside(call) is None:
            continue
        flat = replace(units, repeated=set(), calls=[], side=[])
        parts: list[tuple[int, list[int]]] = []
        outer: list[Call] = []
        for number, span in enumerate(draft.spans()):
            if span.first + place > span.last:
                continue
            inner = units.inside(units.calls[span.first + place])
            if inner is None:
                return
            flat.repeated |= inner.repeated
            flat.side += inner.side
            offset = len(flat.calls)
            flat.calls += inner.calls
            core = [i + offset for i, c in enumerate(inner.calls) if inner.is_core(c)]
            parts.append((number, core))
            outer.append(units.calls[span.first + place])
        every = [flat.calls[i] for _, core in parts for i in core]
        carried = carried_states(flat, every)
        runs: list[tuple[Any, Run]] = []
        for number, core in parts:
            nodes = fold([_symbol(flat, flat.calls[i], carried) for i in core], core)
            runs += [(number, node) for node in nodes if isinstance(node, Run)][:1]
        if runs:
            enclosing: Draft | None = draft if _hand_on(flat, outer, carried) else None
            while enclosing is not None:
                enclosing.carried = enclosing.carried or carried
                enclosing = enclosing.parent
            _add(flat, runs, draft, drafts, carried)


def _hand_on(units: Units, outer: Sequence[Call], carried: Sequence[CarriedState]) -> bool:
    """Whether every call of an outer loop hands on the states that its inner calls update."""
    making = units.trace.making
    for call in outer:
        before = making.count_before(call.end)
        forms = {key for item in call.outputs for key in making.unmixed(item.key, before)}
        for state in carried:
            inside = [c for c in state.calls if call.start < c.start < call.end]
            if not inside or not forms & {item.key for item in inside[-1].outputs}:
                return False
    return bool(outer)


def _span(body: Node) -> Span:
    places = [leaf.index for leaf in body.leaves() if isinstance(leaf, Leaf)]
    return Span(min(places), max(places))


def listed(
    units: Units, iterations: Sequence[Sequence[str]], states: Sequence[str] = ()
) -> list[Draft]:
    """The loop whose iterations a specification lists one by one, and loops in it.

    Args:
        units: The units.
        iterations: Names of the modules of each, in the order in which they are called; one that is
            called several times stands there as often.
        states: The state that each of them updates.

    Returns:
        The loop, then those in it.

    Raises:
        InputError: for modules that do not run in that order.
    """
    places, place = [], 0
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
        places.append(indices)
    carried = carried_states(units, [units.calls[i] for part in places for i in part], states)
    bodies = []
    for part in places:
        symbols = [_symbol(units, units.calls[i], carried) for i in part]
        bodies.append(Sequence_("body", tuple(fold(symbols, part))))
    drafts: list[Draft] = []
    _add(units, [(None, Run(tuple(bodies)))], None, drafts, carried)
    return drafts
