"""Points: the addresses of a wrapped model, each a tensor of one call in one iteration."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformer_lens.hook_points import HookPoint

from loopscope.models.loops import Call, CallTensor, LoopMap, Port, Streams, Trace, Unit, port

PATTERN = ".hook_pattern"


@dataclass
class Addresses:
    """All names of a wrapped model.

    Attributes:
        ports: Canonical name to the tensor it means, in the order in which they arise.
        aliases: Further names.
        cut: Canonical names of what runs where gradients are switched off.
    """

    ports: dict[str, Port] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)


def addresses(trace: Trace, streams: Streams, loop_map: LoopMap) -> Addresses:
    """Name every tensor that enters or leaves a module, by iteration, module and side.

    Args:
        trace: The traced forward pass.
        streams: What a stream looks like; it is preferred where a call has several tensors.
        loop_map: Its map.

    Returns:
        `loop.{path}.{module}.hook_in` and `.hook_out` in a loop, `{module}.hook_in` outside; the
        second call of a module in one place is `{module}:1`. Attentions of transformers have
        `.hook_pattern` too (batch, head, query, key), to read. `hook_embed`, `loop.{path}.hook_in`,
        `loop.{path}.hook_out`, `coda.hook_in`, `hook_h_out` are the states of the main loop, and
        `loop.{name}.after.hook_in` what leaves another.
    """
    names = Addresses()
    places = _places(trace, loop_map)
    by_port: dict[Port, str] = {}
    for call in trace.calls[1:]:
        place = places[call.index]
        for name, where in _ports(trace, streams, call, place):
            names.ports[name] = where
            by_port.setdefault(where, name)
            if trace.root.grad and not call.grad:
                names.cut.add(name)
        if _gives_pattern(trace, call):
            whole = Port(module=call.module, call=call.number, side="out", where=(1,))
            names.ports[f"{place}.hook_pattern"] = whole
    _name_states(names, loop_map, by_port)
    _name_layers(names, loop_map, places)
    return names


def _places(trace: Trace, loop_map: LoopMap) -> dict[int, str]:
    """Where each call stands, by its index: iteration, module, and which of its calls there."""
    spans = sorted(
        ((it.span, it.path) for loop in loop_map.loops for it in loop.iterations),
        key=lambda item: item[0][1] - item[0][0],
    )
    used: Counter[str] = Counter()
    places: dict[int, str] = {}
    for call in trace.calls[1:]:
        path = next((p for (a, b), p in spans if a <= call.index < b), None)
        place = f"{'' if path is None else f'loop.{path}.'}{call.module}"
        used[place] += 1
        if used[place] > 1:
            place = f"{place}:{used[place] - 1}"
        places[call.index] = place
    return places


def _ports(trace: Trace, streams: Streams, call: Call, place: str) -> Iterator[tuple[str, Port]]:
    """A call's names and the tensors that they mean; a HookPoint has a single one."""
    single = isinstance(trace.modules[call.module], HookPoint)
    for side in ("in", "out") if not single else ("out",):
        tensor = _main_tensor(call, streams, side)
        if tensor is not None:
            yield place if single else f"{place}.hook_{side}", port(call, side, tensor)


def _gives_pattern(trace: Trace, call: Call) -> bool:
    """Whether a call is an attention of transformers: it returns (output, pattern) when eager."""
    model, part = trace.modules[""], trace.modules[call.module]
    return (
        hasattr(model, "set_attn_implementation")
        and type(part).__name__.endswith("Attention")
        and any(output.where == (0,) for output in call.outputs)
    )


def _main_tensor(call: Call, streams: Streams, side: str) -> CallTensor | None:
    """The tensor that a call's hook shows: its stream, else its first floating tensor."""
    if side == "out":
        return streams.leaving(call) or next(iter(call.outputs), None)
    shapes = [item.tensor.shape for item in call.outputs[:1] if streams.is_part(item)]
    alike = [item for item in call.inputs if item.tensor.shape in shapes]
    if streams.leaving(call) is None and alike:  # a state at other positions, beside a stream
        return alike[0]
    return next(iter([*streams.entering(call), *call.inputs]), None)


def _name_states(names: Addresses, loop_map: LoopMap, by_port: dict[Port, str]) -> None:
    states: dict[str, Port] = {"hook_embed": loop_map.embed}
    for loop in loop_map.loops:
        for iteration in loop.iterations:
            states[f"loop.{iteration.path}.hook_in"] = iteration.h
            states[f"loop.{iteration.path}.hook_out"] = iteration.h_m
        for state in loop.named:
            for t, iteration in enumerate(loop.iterations):
                states[f"loop.{iteration.path}.{state.name}.hook_in"] = state.h[t]
                states[f"loop.{iteration.path}.{state.name}.hook_out"] = state.h_m[t]
        states[f"loop.{loop.name}.after.hook_in"] = loop.after
        # a module of that name wins
        if loop is loop_map.main and "coda.hook_in" not in names.ports:
            states["coda.hook_in"] = loop.after
    states["hook_h_out"] = loop_map.h_out
    for name, where in states.items():
        if name in names.ports:
            continue
        if where in by_port:
            names.aliases[name] = by_port[where]
        else:
            names.ports[name] = where


def _name_layers(names: Addresses, loop_map: LoopMap, places: dict[int, str]) -> None:
    """`blocks.{v}` over the unrolled depth and `loop.{path}.layer.{l}` in each iteration."""
    inner: dict[str, list[str]] = defaultdict(list)
    for name in names.ports:
        parts = name.split(".")
        for i in range(1, len(parts)):
            inner[".".join(parts[:i])].append(name)

    def alias(prefix: str, place: str) -> None:
        for name in inner[place]:
            names.aliases.setdefault(prefix + name.removeprefix(place), name)

    def layers(unit: Unit) -> list[str]:
        return [places[order] for order in unit.orders]

    for v, place in enumerate(p for unit in loop_map.units() for p in layers(unit)):
        for side, suffix in (("in", "pre"), ("out", "post")):
            if f"{place}.hook_{side}" in names.ports:
                names.aliases[f"blocks.{v}.hook_resid_{suffix}"] = f"{place}.hook_{side}"
        patterns = [name for name in inner[place] if name.endswith(PATTERN)]
        if len(patterns) == 1:
            names.aliases[f"blocks.{v}.attn{PATTERN}"] = patterns[0]
    for loop in loop_map.loops:
        for iteration in loop.iterations:
            for number, place in enumerate(p for u in iteration.units for p in layers(u)):
                alias(f"loop.{iteration.path}.layer.{number}", place)
