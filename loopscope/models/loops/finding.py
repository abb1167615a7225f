"""Finding: from a traced forward pass to its LoopMap."""

import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from loopscope.errors import InputError
from loopscope.models.loops import ports
from loopscope.models.loops.carried_states import drop_repeated_names
from loopscope.models.loops.drafts import Draft, Span, draft_loops, listed
from loopscope.models.loops.folding import split_gaps
from loopscope.models.loops.identity import Identity, Streams
from loopscope.models.loops.loop_map import Iteration, Loop, LoopMap, Port, Unit
from loopscope.models.loops.loop_states import States, states, width_of
from loopscope.models.loops.named_states import StatePorts
from loopscope.models.loops.plain_stack import elsewhere, plain
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, Trace
from loopscope.models.loops.unembedding import Unembedding, find_unembedding
from loopscope.models.loops.units import Units
from loopscope.names import MAIN_LOOP

_PLAIN = re.compile(r"_?(module|level|block|layer|stack|loop|core|group)s?$", re.IGNORECASE)


def letter(number: int) -> str:
    """A, B, C, … for the loops of a model, in order; AA, BB, … after Z.

    Args:
        number: Place of the loop, from 0.

    Returns:
        The letter.
    """
    return string.ascii_uppercase[number % 26] * (1 + number // 26)


def short_name(modules: Sequence[str]) -> str | None:
    """A short name of a loop's modules: `H` for `model.H_module`.

    Args:
        modules: Names of the modules that the loop repeats.

    Returns:
        At most six letters, or None where the modules suggest nothing.
    """
    if len(modules) != 1:
        return None
    last = [part for part in modules[0].split(".") if not part.isdigit()][-1:]
    name = _PLAIN.sub("", last[0]) if last else ""
    return name if 0 < len(name) <= 6 and name.isalpha() else None


def by_iteration(
    trace: Trace, iterations: Sequence[Sequence[Call]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Parameters that more than one iteration uses, and those that one alone uses.

    A use counts to an iteration from the beginning of its first call until the first call after it
    begins, so that parameters used outside of modules count too.

    Args:
        trace: The traced forward pass.
        iterations: The calls of each iteration.

    Returns:
        Names of the shared parameters, and of each iteration's own (none for a single iteration),
        in order of use.
    """
    starts = sorted(call.start for call in trace.calls)
    ticks = [tick for tick, _ in trace.uses]
    used: list[dict[str, None]] = []
    for calls in iterations:
        end = calls[-1].end
        later = bisect_right(starts, end)
        end = starts[later] if later < len(starts) else end
        a, b = bisect_left(ticks, calls[0].start), bisect_left(ticks, end)
        used.append(dict.fromkeys(name for _, name in trace.uses[a:b]))
    count = Counter(name for names in used for name in names)
    shared = tuple(name for name, n in count.items() if n > 1)
    if len(used) == 1:
        return shared, [()]
    return shared, [tuple(name for name in names if count[name] == 1) for names in used]


def find(trace: Trace, streams: Streams, spec: Spec) -> LoopMap:
    """Find roles, loops and iterations in a traced forward pass.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like.
        spec: What the user or the model's family says; may be empty.

    Returns:
        The map, without routers, loop counts and what needs a second forward pass.

    Raises:
        InputError: if the specification does not fit, or the model has no layers to speak of.
    """
    identity = Identity.of(trace.modules)
    core = {identity.symbol[name] for name in spec.core}
    named = core | {identity.symbol[name] for names in spec.iterations for name in names}
    scores = find_unembedding(trace, streams, spec.head)
    units = _units(trace, identity, streams, named, scores, spec.coda or ())
    rest: list[str] = []
    if spec.iterations:
        drafts = listed(units, spec.iterations, spec.states)
    else:
        drafts, rest = draft_loops(units, bool(spec.core) and not spec.states, spec.states)
    doubts = []
    if rest:
        doubts.append(
            f"{', '.join(rest)} also run{'s' if len(rest) == 1 else ''} more than once, and in no "
            "loop; if that is the core, a spec can say so: core = [...]"
        )
    if not drafts:
        loop_map = plain(units, spec)
        doubts += [*loop_map.doubts, *elsewhere(units)]
        return _with_logits(replace(loop_map, doubts=tuple(doubts)), scores)
    for draft in reversed(drafts):  # inner loops first: they widen what encloses them
        _lift(draft)
        _widen(draft)
    _name(drafts)
    if not named:
        looped = [c for d in drafts for s in d.spans() for unit in d.calls(s) for c in _with(unit)]
        doubts += [
            f"{sentence}; a spec can make it the loop that is shown: core = [...]"
            for sentence in elsewhere(units, looped)
        ]
    loop_map = _assemble(units, drafts, spec)
    doubts += _over_positions(streams.pos, loop_map.loops)
    return _with_logits(replace(loop_map, doubts=(*doubts, *loop_map.doubts)), scores)


def _with(call: Call) -> list[Call]:
    return [call, *call.descendants()]


def _with_logits(loop_map: LoopMap, scores: Unembedding) -> LoopMap:
    """The map with where the logits are, and what gives them outside of all modules."""
    return replace(
        loop_map,
        head_weight=scores.weight,
        logits=None if scores.logits is None else scores.logits.where,
        vocabulary=scores.vocabulary,
        why_no_logits=scores.why_none,
    )


def _lift(draft: Draft) -> None:
    """Widen each iteration to the call that contains it and no other, where all have one."""
    units, spans = draft.units, draft.spans()
    taken = {i for s in spans for i in range(s.first, s.last + 1) if units.is_core(units.calls[i])}
    place = {id(call): i for i, call in enumerate(units.calls)}
    wider: list[tuple[Span, Call]] = []
    for span in spans:
        members = set(range(span.first, span.last + 1))
        best = None
        call = units.calls[span.first].parent
        while call is not None:
            covered = [place[id(c)] for c in call.descendants() if id(c) in place]
            if set(covered) & (taken - members):
                break
            if members <= set(covered) and units.streamy(call) and call.parent is not None:
                best = (Span(min(covered), max(covered)), call)
            call = call.parent
        if best is None:
            return
        wider.append(best)
    patterns = {units.identity.pattern(call.module) for _, call in wider}
    if len(patterns) > 1:
        return
    for span, (wide, _) in zip(spans, wider, strict=True):
        span.first, span.last = wide.first, wide.last


def _widen(draft: Draft) -> None:
    """Give what stands between iterations to the one before or the one after."""
    units = draft.units
    pattern = [units.identity.pattern(call.module) for call in units.calls]
    core = [i for i, call in enumerate(units.calls) if units.is_core(call)]
    for run in draft.runs:
        before = max((i for i in core if i < run[0].first), default=-1)
        after = min((i for i in core if i > run[-1].last), default=len(pattern))
        pairs = list(pairwise(run))
        end, begin = split_gaps(
            [pattern[a.last + 1 : b.first] for a, b in pairs],
            pattern[before + 1 : run[0].first],
            pattern[run[-1].last + 1 : after],
            lambda a, b: a == b,
        )
        for earlier, later in pairs:
            cut = later.first - begin
            earlier.last, later.first = cut - 1, cut
        run[0].first -= begin
        run[-1].last += end
        if draft.parent is not None and draft.parent.units is units:
            for outer in draft.parent.spans():
                if outer.first <= run[-1].last and run[0].first <= outer.last:
                    outer.first = min(outer.first, run[0].first)
                    outer.last = max(outer.last, run[-1].last)


def _name(drafts: list[Draft]) -> None:
    """`core` for a single loop; else a short name from its own modules, or a letter."""
    if len(drafts) == 1:
        drafts[0].name = MAIN_LOOP
        return
    bodies = [_body(draft, drafts) for draft in drafts]
    count = Counter(name for body in bodies for name in {call.module for call in body})
    used: set[str] = set()
    for number, (draft, body) in enumerate(zip(drafts, bodies, strict=True)):
        modules = [call.module for call in body]
        name = short_name(modules) or letter(number)
        if any(count[module] > 1 for module in modules):  # one module updates several states
            name = _name_of_state(draft, body) or letter(number)
        while name in used or name == MAIN_LOOP:
            name = letter(number) if name != letter(number) else name + "_"
        used.add(name)
        draft.name = name
    for draft, body in zip(drafts, bodies, strict=True):
        for state in draft.carried:
            if not state.name and any(call in state.calls for call in body):
                state.name = f"z_{draft.name}"
    for draft in drafts:
        drop_repeated_names(draft.carried)


def _body(draft: Draft, drafts: list[Draft]) -> list[Call]:
    """The calls of the core in a loop's first iteration, those of inner loops aside."""
    inner = [d for d in drafts if d.parent is draft]
    covered = {id(c) for d in inner for s in d.spans() for c in d.calls(s)}
    calls = [c for c in draft.calls(draft.spans()[0]) if id(c) not in covered]
    return [c for c in calls if draft.units.is_core(c)]


def _name_of_state(draft: Draft, body: Sequence[Call]) -> str | None:
    """`H` for a loop whose own calls update z_H."""
    names = {state.name for state in draft.carried if any(call in state.calls for call in body)}
    return short_name([names.pop().removeprefix("z_")]) if len(names) == 1 else None


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """The calls around the loops, by role.

    Attributes:
        prelude, between, coda: Units before the first loop, between two, and after the last.
        norm, head: The final norm and the unembedding, where there are any.
    """

    prelude: tuple[Unit, ...]
    between: tuple[Unit, ...]
    coda: tuple[Unit, ...]
    norm: Call | None
    head: Call | None


def _assemble(units: Units, drafts: list[Draft], spec: Spec) -> LoopMap:
    """The map of a model from its loops, whose boundaries are settled."""
    top = [draft for draft in drafts if draft.parent is None]
    maker = ports.UnitMaker(units, width_of(units, top[0].spans()))
    roles = _roles(units, top, maker, spec)
    loops = [_loop(draft, drafts, maker, spec) for draft in drafts]
    _refuse_without_matrices(loops, spec)
    embed, h_out = _ends(units, roles, loops, drafts[0], spec)
    return LoopMap(
        embed=embed,
        prelude=roles.prelude,
        loops=tuple(loops),
        between=roles.between,
        coda=roles.coda,
        h_out=h_out,
        norm=None if roles.norm is None else roles.norm.module,
        head=None if roles.head is None else roles.head.module,
        random=units.trace.random,
        mutates=units.trace.mutates,
        notes=_notes(loops, drafts),
        doubts=(*_doubts(loops), *(doubt for draft in drafts for doubt in draft.doubts)),
        calls=units.trace.counts,
        source=spec.source,
    )


def _roles(units: Units, top: list[Draft], maker: ports.UnitMaker, spec: Spec) -> _Roles:
    """What runs before, between and after the outermost loops."""
    bounds = [(draft.spans()[0].first, draft.spans()[-1].last) for draft in top]
    first, last = bounds[0][0], bounds[-1][1]
    between = [
        call for (_, end), (start, _) in pairwise(bounds) for call in units.calls[end + 1 : start]
    ]
    core = [c for c in units.calls[: last + 1] if units.is_core(c)]
    head = ports.head_of(units, core[-1])
    prelude = maker.role(units.calls[:first])
    rest = [c for c in units.calls[last + 1 :] if c is not head]
    coda, norm = ports.split_norm(units, rest, head)
    return _Roles(
        prelude=spec.pick("prelude", prelude, units.trace.counts),
        between=maker.role(between),
        coda=spec.pick("coda", maker.role(coda), units.trace.counts),
        norm=norm,
        head=head,
    )


def _ends(
    units: Units, roles: _Roles, loops: list[Loop], draft: Draft, spec: Spec
) -> tuple[Port, Port]:
    """h_emb and h_out: those of the tokens, or of the first loop where it has other positions."""
    embed = ports.embed_port(units, roles.prelude, loops, spec)
    h_out = ports.out_port(units, roles.coda, loops, roles.norm)
    state = loops[0].iterations[0].h
    whole = loops[0].iterations[0].h_m
    if len(state.shape) == 3 and 1 not in state.shape:  # no initial vector, the same everywhere
        whole = state
    if whole.shape[:2] == embed.shape[:2]:
        return embed, h_out
    draft.notes.append(
        f"the loop runs over {state.shape[1]} positions, not those of the tokens; h_emb and "
        "h_out are its first and last state"
    )
    return state, loops[0].after


def _refuse_without_matrices(loops: list[Loop], spec: Spec) -> None:
    """Raise for a core of norms, dropouts and the like: no call of it has a role."""
    if all(any(it.units for it in loop.iterations) for loop in loops):
        return
    names = dict.fromkeys([*spec.core, *(name for names in spec.iterations for name in names)])
    raise InputError(
        f"core of the specification names {', '.join(names)}, which "
        f"{'has' if len(names) == 1 else 'have'} no matrix; name the layers that the state runs "
        "through."
    )


def _doubts(loops: list[Loop]) -> tuple[str, ...]:
    units = {loop.name: [unit for it in loop.iterations for unit in it.units] for loop in loops}
    return tuple(
        f"{name} has no layer, only bare matrices ({inside[0].module}, …); "
        "if its state is handed on in an object of its own, hooks see parts of it alone"
        for name, inside in units.items()
        if not any(unit.layers for unit in inside)
    )


def _over_positions(pos: int | None, loops: Sequence[Loop]) -> list[str]:
    """A doubt for a loop that runs once for each position, on one at a time."""
    return [
        f"{loop.name} runs once for each of the example's {pos} positions, on one at a time: it "
        "may be a loop over positions, whose states are not those of one token in depth"
        for loop in loops
        if loop.K == pos != 1 and all(it.h_m.shape[1:2] == (1,) for it in loop.iterations)
    ]


def _notes(loops: list[Loop], drafts: list[Draft]) -> tuple[str, ...]:
    """What a user should know: gradients that are missing, the loops' notes, several loops."""
    notes = [*_without_gradients(loops), *(note for draft in drafts for note in draft.notes)]
    top = [draft for draft in drafts if draft.parent is None]
    if len(top) > 1:
        notes.append(
            f"{len(top)} loops run one after the other ({', '.join(d.name for d in top)}); each "
            "is shown for itself. A spec with core = [...] keeps the one you mean."
        )
    return tuple(notes)


def _without_gradients(loops: list[Loop]) -> list[str]:
    cut = [it.path for loop in loops for it in loop.iterations if not it.grad]
    if not cut:
        return []
    inner = [p for p in cut if not any(o.startswith(p + ".") for o in cut)]
    what = f"iteration{'s' if len(inner) > 1 else ''} {', '.join(inner)}"
    if len(cut) == sum(loop.K for loop in loops):
        what = "all iterations"
    return [f"the model runs {what} without gradients (torch.no_grad in its forward)"]


def _loop(draft: Draft, drafts: list[Draft], maker: ports.UnitMaker, spec: Spec) -> Loop:
    """One loop with its states, iterations and parameters."""
    units, spans = draft.units, draft.spans()
    boundary = states(units, spans, spec if draft.parent is None else Spec(carried=spec.carried))
    finder = StatePorts(units, [draft.calls(span) for span in spans], draft.carried)
    fixed = spec.source == "spec" and not spec.states and draft.parent is None
    fixed = fixed and any((spec.input, spec.output, spec.columns))  # a user's own state
    named = [] if fixed else finder.find()
    if named:
        main = named[0]
        boundary = States(list(main.h), list(main.h_m), main.after, [])
        draft.doubts += finder.doubts
    elif boundary.doubt:
        draft.doubts.append(boundary.doubt)
    paths = _paths(draft, drafts)
    shared, private = by_iteration(units.trace, [draft.calls(span) for span in spans])
    if boundary.cut and draft.parent is None:
        detached = ", ".join(paths[t] for t in boundary.cut)
        draft.notes.append(
            f"no gradient flows from iteration {detached} of {draft.name} back to the one before: "
            "the state is detached there, or the iterations do not depend on each other"
        )
    maker = ports.UnitMaker(units, maker.width)
    iterations = tuple(
        _iteration(units.trace, draft.calls(span), maker, path, h, h_m, names)
        for span, path, h, h_m, names in zip(
            spans, paths, boundary.h, boundary.h_m, private, strict=True
        )
    )
    if named:
        iterations = tuple(
            replace(it, read_before=(named[0].name, t) in finder.read_before)
            for t, it in enumerate(iterations)
        )
    return Loop(
        name=draft.name,
        iterations=_with_side_branches(units, iterations),
        after=boundary.after,
        parent=draft.parent.name if draft.parent else None,
        shared=shared,
        mechanic=_mechanic(iterations),
        named=tuple(named),
    )


def _with_side_branches(units: Units, iterations: tuple[Iteration, ...]) -> tuple[Iteration, ...]:
    """Iterations that reach over what runs between them and leads nowhere."""
    wider: list[Iteration] = []
    for it, later in pairwise(iterations):
        end = it.span[1]
        if it.path.rpartition(".")[0] == later.path.rpartition(".")[0]:
            for call in units.side:
                if it.span[1] <= call.index < later.span[0]:
                    end = max(end, *(part.index + 1 for part in (call, *call.descendants())))
        wider.append(replace(it, span=(it.span[0], end)))
    return (*wider, *iterations[-1:])


def _iteration(
    trace: Trace,
    calls: list[Call],
    maker: ports.UnitMaker,
    path: str,
    h: Port,
    h_m: Port,
    private: tuple[str, ...],
) -> Iteration:
    role = maker.role(calls)
    every = [call for unit in calls for call in (unit, *unit.descendants())]
    indices = [call.index for call in every]
    return Iteration(
        path=path,
        units=role,
        h=h,
        h_m=h_m,
        span=(min([*indices, *(unit.order for unit in role)]), max(indices) + 1),
        grad=not trace.root.grad or all(call.grad for call in every),
        own=private,
    )


def _mechanic(iterations: Sequence[Iteration]) -> Literal["module", "parameters", "none"]:
    """What neighbouring iterations share: modules, or the parameters of distinct ones."""
    names = [{unit.module for unit in it.units} for it in iterations]
    if any(a & b for a, b in pairwise(names)):
        return "module"
    symbols = [{unit.shared for unit in it.units} for it in iterations]
    return "parameters" if any(a & b for a, b in pairwise(symbols)) else "none"


def _paths(draft: Draft, drafts: list[Draft]) -> list[str]:
    """`0`, `1`, … for the only loop; else `H0`, `H0.L2`: counted anew in each run."""
    if draft.parent is None:
        plain = len(drafts) == 1
        return [str(t) if plain else f"{draft.name}{t}" for t in range(len(draft.spans()))]
    outer = _paths(draft.parent, drafts)
    bounds = [
        (calls[0].start, calls[-1].end)
        for calls in (draft.parent.calls(s) for s in draft.parent.spans())
    ]
    paths: list[str] = []
    for run in draft.runs:
        begin = draft.calls(run[0])[0].start
        where = next(i for i, (a, b) in enumerate(bounds) if a <= begin <= b)
        earlier = sum(p.startswith(f"{outer[where]}.{draft.name}") for p in paths)
        paths += [f"{outer[where]}.{draft.name}{earlier + t}" for t in range(len(run))]
    return paths


def _units(
    trace: Trace,
    identity: Identity,
    streams: Streams,
    core: set[str],
    scores: Unembedding,
    outside: Collection[str],
) -> Units:
    """The units, where streams are (batch, pos, width), or (batch, ·, width) if only that loops."""
    ends = (scores.width, scores.call, outside)
    units = Units.of(trace, identity, streams, core, *ends)
    lost = core - {units.symbol(c) for c in trace.calls if units.is_core(c)}
    if lost and lost == core:
        fewer = Units.of(trace, identity, Streams(streams.batch, None), core, *ends)
        if any(map(fewer.is_core, trace.calls)):
            return fewer
        raise InputError(
            f"core of the specification names {', '.join(sorted(lost))}, which turns no "
            "(batch, pos, width) into (batch, pos, width); name the modules that the state runs "
            "through."
        )
    if units.repeated or None in (streams.batch, streams.pos):
        return units
    fewer = Units.of(trace, identity, Streams(streams.batch, None), core, *ends)
    if fewer.repeated:
        return fewer
    turned = Units.of(trace, identity, Streams(streams.pos, streams.batch), core, *ends)
    if turned.repeated and streams.pos != streams.batch:
        raise InputError(
            f"{', '.join(sorted(turned.repeated))} runs again on tensors (pos, batch, width); "
            "loopscope reads (batch, pos, width). Put the batch first (batch_first=True)."
        )
    return units
