"""Finding: from a traced forward pass to its LoopMap."""

import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from loopscope.errors import InputError
from loopscope.models.loops import ports
from loopscope.models.loops.drafts import Draft, Span, draft_loops, listed
from loopscope.models.loops.folding import split_gaps
from loopscope.models.loops.identity import Identity, Streams
from loopscope.models.loops.loop_map import Iteration, Loop, LoopMap
from loopscope.models.loops.loop_states import states, width_of
from loopscope.models.loops.plain_stack import elsewhere, plain
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call, Trace
from loopscope.models.loops.units import Units

_PLAIN = re.compile(r"_?(module|level|block|layer|stack|loop|core|group)s?$", re.IGNORECASE)


def letter(number: int) -> str:
    """A, B, C, … for the loops of a model, in order."""
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
    count = Counter(name for one in used for name in one)
    shared = tuple(name for name, n in count.items() if n > 1)
    if len(used) == 1:
        return shared, [()]
    return shared, [tuple(name for name in one if count[name] == 1) for one in used]


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
    named = core | {identity.symbol[n] for one in spec.iterations for n in one}
    logits = ports.logits_of(trace)
    width = None if logits is None else logits.tensor.shape[-1]
    units = _units(trace, identity, streams, named, width)
    rest: list[str] = []
    if spec.iterations:
        drafts = listed(units, spec.iterations)
    else:
        drafts, rest = draft_loops(units, one=bool(spec.core))
    doubts = []
    if rest:
        doubts.append(
            f"{', '.join(rest)} also run{'s' if len(rest) == 1 else ''} more than once, and in no "
            "loop; if that is the core, a spec can say so: core = [...]"
        )
    if not drafts:
        return replace(plain(units, spec), doubts=(*doubts, *elsewhere(units)))
    for draft in reversed(drafts):  # inner loops first: they widen what encloses them
        _lift(draft)
        _widen(draft)
    _name(drafts)
    found = _assemble(units, drafts, spec)
    return replace(found, doubts=(*doubts, *found.doubts))


def _lift(draft: Draft) -> None:
    """Widen each iteration to the call that contains it and no other, where all have one."""
    units, spans = draft.units, draft.spans()
    taken = {i for s in spans for i in range(s.first, s.last + 1) if units.is_core(units.calls[i])}
    place = {id(call): i for i, call in enumerate(units.calls)}
    wider: list[tuple[Span, Call]] = []
    for span in spans:
        own = {i for i in range(span.first, span.last + 1)}
        best = None
        call = units.calls[span.first].parent
        while call is not None:
            covered = [place[id(c)] for c in call.descendants() if id(c) in place]
            if set(covered) & (taken - own):
                break
            if own <= set(covered) and units.streamy(call) and call.parent is not None:
                best = (Span(min(covered), max(covered)), call)
            call = call.parent
        if best is None:
            return
        wider.append(best)
    patterns = {units.identity.pattern(call.module) for _, call in wider}
    if len(patterns) > 1:
        return
    for span, (found, _) in zip(spans, wider, strict=True):
        span.first, span.last = found.first, found.last


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
        for one, two in pairs:
            cut = two.first - begin
            one.last, two.first = cut - 1, cut
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
        drafts[0].name = "core"
        return
    used: set[str] = set()
    for number, draft in enumerate(drafts):
        inner = [d for d in drafts if d.parent is draft]
        covered = {id(c) for d in inner for s in d.spans() for c in d.calls(s)}
        own = [c for c in draft.calls(draft.spans()[0]) if id(c) not in covered]
        heavy = [c for c in own if draft.units.is_core(c)]
        name = short_name([c.module for c in heavy]) or letter(number)
        while name in used or name == "core":
            name = letter(number) if name != letter(number) else name + "_"
        used.add(name)
        draft.name = name


def _assemble(units: Units, drafts: list[Draft], spec: Spec) -> LoopMap:
    top = [draft for draft in drafts if draft.parent is None]
    first, last = top[0].spans()[0].first, top[-1].spans()[-1].last
    maker = ports.UnitMaker(units, width_of(units, top[0].spans()))
    inside = [(d.spans()[0].first, d.spans()[-1].last) for d in top]
    between = [
        call for (_, end), (start, _) in pairwise(inside) for call in units.calls[end + 1 : start]
    ]
    core = [c for c in units.calls[: last + 1] if units.is_core(c)]
    head = ports.head_of(units, core[-1])
    prelude = maker.role(units.calls[:first])
    rest = [c for c in units.calls[last + 1 :] if c is not head]
    coda, norm = ports.split_norm(units, rest, head)
    found_prelude = spec.pick("prelude", prelude, units.trace.counts)
    found_coda = spec.pick("coda", maker.role(coda), units.trace.counts)
    loops = [_loop(draft, drafts, maker, spec) for draft in drafts]
    embed = ports.embed_port(units, found_prelude, loops, spec)
    h_out = ports.out_port(units, found_coda, loops, norm)
    state = loops[0].iterations[0].h
    if state.shape[:2] != embed.shape[:2]:
        embed, h_out = state, loops[0].after
        drafts[0].notes.append(
            f"the loop runs over {state.shape[1]} positions, not those of the tokens; h_emb and "
            "h_out are its first and last state"
        )
    bare = [loop for loop in loops if not any(u.layers for it in loop.iterations for u in it.units)]
    doubts = tuple(
        f"{loop.name} has no layer, only bare matrices ({loop.iterations[0].units[0].module}, …); "
        "if its state is handed on in an object of its own, hooks see parts of it alone"
        for loop in bare
    )
    notes = [*_notes(loops), *(note for draft in drafts for note in draft.notes)]
    if len(top) > 1:
        notes.append(
            f"{len(top)} loops run one after the other ({', '.join(d.name for d in top)}); each "
            "is shown for itself. A spec with core = [...] keeps the one you mean."
        )
    return LoopMap(
        embed=embed,
        prelude=found_prelude,
        loops=tuple(loops),
        between=maker.role(between),
        coda=found_coda,
        h_out=h_out,
        norm=None if norm is None else norm.module,
        head=None if head is None else head.module,
        random=units.trace.random,
        mutates=units.trace.mutates,
        notes=tuple(notes),
        doubts=doubts,
        calls=units.trace.counts,
        source=spec.source,
    )


def _loop(draft: Draft, drafts: list[Draft], maker: ports.UnitMaker, spec: Spec) -> Loop:
    units, spans = draft.units, draft.spans()
    maker = ports.UnitMaker(units, maker.width)
    chosen = states(units, spans, spec if draft.parent is None else Spec(carried=spec.carried))
    paths = _paths(draft, drafts)
    shared, own = by_iteration(units.trace, [draft.calls(span) for span in spans])
    if chosen.cut and draft.parent is None:
        first = ", ".join(paths[t] for t in chosen.cut)
        draft.notes.append(
            f"no gradient flows from iteration {first} of {draft.name} back to the one before: the "
            "state is detached there, or the iterations do not depend on each other"
        )
    iterations = []
    for i, span in enumerate(spans):
        calls = draft.calls(span)
        role = maker.role(calls)
        inside = [c.index for call in calls for c in (call, *call.descendants())]
        iterations.append(
            Iteration(
                path=paths[i],
                units=role,
                h=chosen.h[i],
                h_m=chosen.h_m[i],
                span=(min([*inside, *(u.order for u in role)]), max(inside) + 1),
                grad=not units.trace.root.grad
                or all(d.grad for c in calls for d in (c, *c.descendants())),
                own=own[i],
            )
        )
    symbols = [{u.shared for u in it.units} for it in iterations]
    names = [{u.module for u in it.units} for it in iterations]
    again = any(a & b for a, b in pairwise(names))
    tied = any(a & b for a, b in pairwise(symbols))
    return Loop(
        name=draft.name,
        iterations=tuple(iterations),
        after=chosen.after,
        parent=draft.parent.name if draft.parent else None,
        shared=shared,
        mechanic="module" if again else "parameters" if tied else "none",
    )


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


def _notes(loops: list[Loop]) -> list[str]:
    cut = [it.path for loop in loops for it in loop.iterations if not it.grad]
    if not cut:
        return []
    inner = [p for p in cut if not any(o.startswith(p + ".") for o in cut)]
    what = f"iteration{'s' if len(inner) > 1 else ''} {', '.join(inner)}"
    if len(cut) == sum(loop.K for loop in loops):
        what = "all iterations"
    return [f"the model runs {what} without gradients (torch.no_grad in its forward)"]


def _units(
    trace: Trace, identity: Identity, streams: Streams, core: set[str], width: int | None
) -> Units:
    """The units, where streams are (batch, pos, width), or (batch, ·, width) if only that loops."""
    units = Units.of(trace, identity, streams, core, width)
    lost = core - {units.symbol(c) for c in trace.calls if units.is_core(c)}
    if lost and lost == core:
        raise InputError(
            f"core of the specification names {', '.join(sorted(lost))}, which turns no "
            "(batch, pos, width) into (batch, pos, width); name the modules that the state runs "
            "through."
        )
    if units.repeated or None in (streams.batch, streams.pos):
        return units
    fewer = Units.of(trace, identity, Streams(streams.batch, None), core, width)
    if fewer.repeated:
        return fewer
    turned = Units.of(trace, identity, Streams(streams.pos, streams.batch), core, width)
    if turned.repeated and streams.pos != streams.batch:
        raise InputError(
            f"{', '.join(sorted(turned.repeated))} runs again on tensors (pos, batch, width); "
            "loopscope reads (batch, pos, width). Put the batch first (batch_first=True)."
        )
    return units
