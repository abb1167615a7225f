"""Points: the addresses of a wrapped model, each a tensor of one call in one iteration."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformer_lens.hook_points import HookPoint

from loopscope.errors import InputError
from loopscope.models.loops import (
    Call,
    CallTensor,
    Iteration,
    LoopMap,
    Port,
    Producer,
    Router,
    Streams,
    Trace,
    Unit,
    port,
)

PATTERN = ".hook_pattern"
STATE = ".hook_state"


@dataclass
class Addresses:
    """All names of a wrapped model.

    Attributes:
        ports: Canonical name to the tensor it means, in the order in which they arise.
        aliases: Further names.
        cut: Canonical names of what runs where gradients are switched off.
        weights: Names among `ports` whose tensor is shown as a router's weights.
        slots: Names of MeSH's memory slots, which are no tensor of the model's, to read: iteration,
            -1 for the transitional cycle.
        states: Names of states for all that reads them, to where they enter and what makes them.
    """

    ports: dict[str, Port] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    weights: dict[str, Router] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    states: dict[str, tuple[Port, Producer]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """All canonical names: states, slots and weights before the tensors of modules."""
        return list(dict.fromkeys([*self.states, *self.slots, *self.weights, *self.ports]))

    def no_tensor(self) -> set[str]:
        """Names without a tensor that gradients flow through as in a native model."""
        return {*self.slots, *self.weights}

    def with_gradients(self, names_filter: Any, chosen: set[str]) -> Any:
        """A filter for backward hooks.

        Args:
            names_filter: A name, or a predicate.
            chosen: The canonical names that it means.

        Returns:
            The filter; a predicate without the names that have no gradient.

        Raises:
            InputError: if a name has none.
        """
        without = chosen & self.no_tensor()
        if without and not callable(names_filter):
            raise InputError(
                f"{min(without)} is computed from what the model's modules give, so no gradient "
                "arrives there; take it at the modules' hook_out."
            )
        return (lambda name: name in chosen - without) if without else names_filter


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
        `loop.{name}.after.hook_in` what leaves another. `loop.{path}.hook_in` is what the core is
        given, `loop.{path}.hook_state` the same state for all that reads it. Routers of a memory
        have `loop.{path}.write.hook_weights` and `.read.hook_weights`, slots that follow from them
        `loop.{path}.hook_memory`, and both `transition.…`.
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
    _name_memory(names, loop_map)
    for loop in loop_map.loops:
        for iteration in loop.iterations:
            _name_state(names, iteration)
    return names


def _name_memory(names: Addresses, loop_map: LoopMap) -> None:
    """Router weights and, where they follow from them, memory slots."""
    taken = {*names.ports, *names.aliases}  # modules of those names win
    for router in loop_map.routers:
        if router.kind == "gate":
            continue
        main = router.loop == loop_map.loops[0].name
        cycles: dict[str, Port | None] = {"transition": router.transition} if main else {}
        iterations = loop_map.loop(router.loop).iterations
        cycles |= {
            f"loop.{it.path}": where for it, where in zip(iterations, router.outputs, strict=True)
        }
        for cycle, where in cycles.items():
            name = f"{cycle}.{router.kind}.hook_weights"
            if where is not None and name not in taken:
                names.ports[name], names.weights[name] = where, router
    if loop_map.mesh_cycle and loop_map.main is not None:
        places = ["transition", *(f"loop.{it.path}" for it in loop_map.main.iterations)]
        for t, cycle in enumerate(places, start=-1):
            if f"{cycle}.hook_memory" not in taken:
                names.slots[f"{cycle}.hook_memory"] = t


def _name_state(names: Addresses, iteration: Iteration) -> None:
    """The state of an iteration for all that reads it, where what makes it is known."""
    name = f"loop.{iteration.path}{STATE}"
    entering = f"loop.{iteration.path}.hook_in"
    if iteration.producer is None or name in names.ports or name in names.aliases:
        return
    if iteration.h.side == "out":  # what a module gives: all that reads it is given the same
        names.aliases[name] = names.aliases.get(entering, entering)
    else:
        names.states[name] = (iteration.h, iteration.producer)


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
                prefix = f"loop.{iteration.path}.{state.name}"
                if any(address.startswith(f"{prefix}.") for address in names.ports):  # a module
                    prefix = f"loop.{iteration.path}.state.{state.name}"
                states[f"{prefix}.hook_in"] = state.h[t]
                states[f"{prefix}.hook_out"] = state.h_m[t]
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
