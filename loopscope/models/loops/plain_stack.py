"""Plain stacks: the map of a model without a loop, and its layers grouped into virtual blocks."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

from loopscope.errors import EXAMPLE, InputError
from loopscope.models.loops import ports
from loopscope.models.loops.identity import Streams
from loopscope.models.loops.loop_map import Iteration, Loop, LoopMap, Unit
from loopscope.models.loops.spec import Spec
from loopscope.models.loops.tracing import Call
from loopscope.models.loops.units import BLOCK_SHARE, Units, chain
from loopscope.names import MAIN_LOOP


def plain(units: Units, spec: Spec) -> LoopMap:
    """The map of a stack without a loop.

    Args:
        units: The traced forward pass.
        spec: What the user says.

    Returns:
        All layers as the prelude; `regroup` makes virtual blocks of them.

    Raises:
        InputError: if there are no layers.
    """
    layers = _layers(units)
    maker = ports.UnitMaker(units, None)
    found = maker.role(layers)
    if not found and None not in (units.streams.batch, units.streams.pos):
        fewer = replace(units, streams=Streams(units.streams.batch, None))
        if layers := _layers(fewer):
            return _with_positions(plain(fewer, spec), units.streams.pos)
    if not found:
        raise InputError(
            "no layers were found: "
            + ("; ".join(elsewhere(units)) or "no module with a matrix turns a stream into another")
            + ". Layers turn (batch, pos, width) into (batch, pos, width); give token ids (batch, "
            f"pos) as an {EXAMPLE}, or bring the tensors into that form."
        )
    head = ports.head_of(units, layers[-1])
    doubts = _heads(units, layers)
    parents = {layer.parent for layer in layers}
    after = [c for c in units.trace.root.descendants() if c.start > layers[-1].end]
    tail = [c for c in after if c.parent in parents and c is not head]
    _, norm = ports.split_norm(units, tail, head)
    prelude = spec.pick("prelude", found, units.trace.counts)
    coda = spec.pick("coda", (), units.trace.counts)
    return LoopMap(
        embed=prelude[0].h,
        prelude=prelude,
        loops=(),
        coda=coda,
        h_out=prelude[-1].h_m if norm is None else ports.entering(units, norm),
        norm=None if norm is None else norm.module,
        head=None if head is None else head.module,
        random=units.trace.random,
        mutates=units.trace.mutates,
        doubts=doubts if spec.prelude is None else (),
        calls=units.trace.counts,
        source=spec.source,
    )


def _heads(units: Units, layers: list[Call]) -> tuple[str, ...]:
    """A doubt for what follows a list of layers, is of another class and gives the result."""
    patterns = [units.identity.pattern(layer.module) for layer in layers]
    last = layers[-1]
    given = {item.key for item in units.trace.root.outputs}
    result = any(item.key in given for item in last.outputs)
    if (
        not result
        or len(layers) < 3
        or patterns[-1] in patterns[:-1]
        or len(set(patterns[:-1])) != 1
    ):
        return ()
    return (
        f"{last.module} follows the layers, is of another class and gives what the model returns: "
        "it is counted as a layer, though it may be a head. If it is one, a spec can name the "
        'layers: prelude = ["..."]',
    )


def _with_positions(loop_map: LoopMap, pos: int | None) -> LoopMap:
    """The map of layers that run over other positions than those of the example."""
    first, last = loop_map.prelude[0].h.shape[1], loop_map.prelude[-1].h_m.shape[1]
    n = str(last) if first == last else f"{first} … {last}"
    note = f"the layers run over {n} positions, the example's first tensor has {pos}"
    return replace(loop_map, notes=(*loop_map.notes, note))


def _layers(units: Units) -> list[Call]:
    """The layers: a list of them and what else stands beside it, or the first there is."""
    layers = chain(units.trace.root, units)
    if layers and layers[0].parent is not None:
        beside = [c for c in layers[0].parent.children if _is_layer(c, units)]
        return sorted({id(c): c for c in (*layers, *beside)}.values(), key=lambda c: c.index)
    every = [c for c in units.trace.root.descendants() if _is_layer(c, units)]
    outer = [c for c in every if c.parent not in every]
    return outer if len({c.parent for c in outer}) == 1 else outer[:1]


def _is_layer(call: Call, units: Units) -> bool:
    leaf = units.identity.is_leaf(call.module)
    return units.is_layered(call) and not leaf and not units.is_head(call)


def elsewhere(units: Units, seen: Collection[Call] = ()) -> list[str]:
    """What runs again on tensors that are no streams: a loop that cannot be read.

    Args:
        units: The traced forward pass.
        seen: Calls in loops that were found.

    Returns:
        A sentence for each such module; empty where there is none.
    """
    identity, calls = units.identity, [*units.trace.root.descendants()]
    total = sum(identity.weight[c.module] for c in calls if identity.is_leaf(c.module))
    heavy = [
        c
        for c in calls
        if not identity.is_leaf(c.module)
        and identity.weight[c.module]
        and c.inputs
        and (not any(map(units.streams.is_stream, c.inputs)) or _turns_away(c, units))
    ]
    count = Counter(units.symbol(c) for c in heavy)
    known = {units.symbol(call) for call in seen}
    again = [c for c in heavy if count[units.symbol(c)] > 1 and units.symbol(c) not in known]
    outer = {units.symbol(c): c for c in reversed(again) if c.parent not in again}
    return [
        f"{name} runs {count[name]} times on tensors of shape {_shape(call, units)}"
        for name, call in outer.items()
        if count[name] * identity.weight[call.module] >= BLOCK_SHARE * total
    ]


def _turns_away(call: Call, units: Units) -> bool:
    """Whether a call is given a stream only beside a state of other positions."""
    first, given = call.inputs[0], call.outputs[:1]
    return any(
        first.tensor.shape == item.tensor.shape and not units.streams.is_stream(item)
        for item in given
        if item.tensor.ndim == 3
    )


def _shape(call: Call, units: Units) -> str:
    shape = tuple(call.inputs[0].tensor.shape)
    if len(shape) == 3 and shape[0] == units.streams.batch:
        return f"{shape}, whose positions are not the {units.streams.pos} of the example"
    return f"{shape}, which is not (batch, pos, width)"


def regroup(loop_map: LoopMap, prelude: int, cores: tuple[int, ...]) -> LoopMap:
    """The layers of a plain stack as virtual blocks.

    Args:
        loop_map: The map of a plain stack.
        prelude: Layers before the first block.
        cores: Layers of each block; what is left is the coda.

    Returns:
        The map with one loop whose iterations share nothing.
    """
    layers = loop_map.prelude
    cuts = [prelude]
    for depth in cores:
        cuts.append(cuts[-1] + depth)
    starts = [*(layer.order for layer in layers), layers[-1].order + 1]
    iterations = tuple(
        Iteration(
            path=str(t), units=layers[a:b], h=layers[a].h, h_m=layers[b - 1].h_m,
            span=(starts[a], starts[b]),
        )
        for t, (a, b) in enumerate(pairwise(cuts))
    )  # fmt: skip
    rest: tuple[Unit, ...] = layers[cuts[-1] :]
    after = rest[0].h if rest else loop_map.h_out
    loop = Loop(name=MAIN_LOOP, iterations=iterations, after=after, mechanic="none")
    return replace(loop_map, prelude=layers[:prelude], loops=(loop,), coda=rest, source="layout")
