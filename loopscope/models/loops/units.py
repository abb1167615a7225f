"""Units: the calls of a trace that a model is made of, at the level at which its loop shows."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from loopscope.models.loops.identity import Identity, Streams
from loopscope.models.loops.side_branches import side_branches
from loopscope.models.loops.tracing import Call, Trace

BLOCK_SHARE, MATRIX_SHARE = 0.01, 0.1
"""What a repeated block, or a bare matrix, must make up of all matrix products to be a core."""

ALL_BUT = 0.9
"""What a list of one layer makes up of the stack around it, at least."""

DEEPEST = 12
"""How many wrappers a list of layers is looked for in."""


@dataclass(eq=False)
class Units:
    """A traced forward pass as a flat sequence of calls.

    Attributes:
        trace: The traced forward pass.
        identity: Its modules.
        streams: What a stream looks like.
        repeated: Symbols of the units that repeat and weigh enough to be a core.
        calls: The units in order; lists and wrappers around a loop are opened, what does not
            repeat is one unit. Side branches are left out.
        logits_width: Width of the logits, where it is another than the state's.
        head: The call that gives them, if it is known.
        side: The side branches: calls that no later iteration depends on.
    """

    trace: Trace
    identity: Identity
    streams: Streams
    repeated: set[str]
    calls: list[Call]
    logits_width: int | None = None
    head: Call | None = None
    side: list[Call] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        trace: Trace,
        identity: Identity,
        streams: Streams,
        core: Collection[str] = (),
        logits_width: int | None = None,
        head: Call | None = None,
        outside: Collection[str] = (),
    ) -> "Units":
        """Find the units of a whole model.

        Args:
            trace: The traced forward pass.
            identity: Its modules.
            streams: What a stream looks like.
            core: Symbols of the core where a specification gives them.
            logits_width: Width of the logits, where it is another than the state's.
            head: The call that gives them, if it is known.
            outside: Names of modules that are no part of the core, as a specification says.

        Returns:
            The units.
        """
        units = cls(trace, identity, streams, set(core), [], logits_width, head)
        units.repeated = units.repeated or units._repeated([*trace.root.descendants()])
        units.repeated -= {
            identity.symbol[part]
            for name in outside
            for part in identity.modules
            if f"{part}.".startswith(f"{name}.")
        } - set(core)
        units.calls = units.under(trace.root)
        units._leave_out(outside, set(core))
        return units

    def _leave_out(self, outside: Collection[str], core: set[str]) -> None:
        """Take side branches out of the units, and what a specification puts outside the loop."""
        layered = [call for call in self.calls if self.is_layered(call) and not self.is_head(call)]
        side = side_branches(
            self.trace, layered, self.symbol, self.is_core,
            lambda call: self.identity.pattern(call.module),
        )  # fmt: skip
        inside = [call.index for call in self.calls if self.is_core(call)]
        side |= {
            call.index
            for call in self.calls
            if call.module in outside and inside and inside[0] < call.index < inside[-1]
        }
        self.side = [c for c in self.calls if c.index in side and self.symbol(c) not in core]
        if self.side:
            self.calls = [call for call in self.calls if call not in self.side]
            count = Counter(self.symbol(call) for call in self.calls)
            self.repeated -= {s for s in self.repeated - core if count[s] < 2}

    def symbol(self, call: Call) -> str:
        """What makes two calls calls of the same thing.

        Args:
            call: The call.

        Returns:
            The name of the first module with the parameters of the one called.
        """
        return self.identity.symbol[call.module]

    def streamy(self, call: Call) -> bool:
        """Whether a call turns a stream into a stream.

        Args:
            call: The call.

        Returns:
            True where a stream enters it and one leaves it.
        """
        return bool(self.streams.entering(call)) and self.streams.leaving(call) is not None

    def _repeated(self, calls: Sequence[Call]) -> set[str]:
        heavy = [c for c in calls if self.identity.weight[c.module] and self.streamy(c)]
        heavy = [c for c in heavy if not self.is_head(c)]
        count = Counter(self.symbol(c) for c in heavy)
        total = sum(
            self.identity.weight[c.module]
            for c in calls
            if self.identity.is_leaf(c.module) and not self.is_head(c)
        )
        cost: dict[str, int] = defaultdict(int)
        leaf: dict[str, bool] = {}
        for call in heavy:
            cost[self.symbol(call)] += self.identity.weight[call.module]
            leaf[self.symbol(call)] = self.identity.is_leaf(call.module)
        return {
            s
            for s, n in count.items()
            if n > 1 and cost[s] >= (MATRIX_SHARE if leaf[s] else BLOCK_SHARE) * max(total, 1)
        }

    def inside(self, call: Call) -> "Units | None":
        """The units of a repeated call, where something repeats in it.

        Args:
            call: The call.

        Returns:
            Its units; None where nothing but single layers repeats.
        """
        repeated = self._repeated([*call.descendants()])
        repeated = {s for s in repeated if not self.identity.is_leaf(s)}  # a layer may reuse one
        inner = replace(self, repeated=repeated, calls=[], side=[])
        if not inner.repeated:
            return None
        inner.calls = inner.under(call)
        inner._leave_out((), set())
        return inner

    def under(self, call: Call) -> list[Call]:
        """The units in one call, in order.

        Args:
            call: The call.

        Returns:
            Calls that may be a core, and those beside them that hold parameters.
        """
        inner: list[Call] = []
        for child in call.children:
            if self.is_core(child):
                inner.append(child)
            elif any(map(self.is_core, child.descendants())):
                inner += self.under(child)
            elif self.identity.has_parameters(child.module):
                inner.append(child)
        return inner

    def is_head(self, call: Call) -> bool:
        """Whether a call turns another width into that of the logits, or is known to give them.

        Args:
            call: The call.

        Returns:
            True where it does, as the unembedding.
        """
        if self.head is not None and call.module == self.head.module:
            return True
        width = self.logits_width
        entering = [item.tensor.shape[-1] for item in call.inputs if item.tensor.ndim == 3]
        leaving = [item.tensor.shape[-1] for item in call.outputs if item.tensor.ndim == 3]
        return width in leaving and bool(entering) and not set(entering) & set(leaving)

    def is_core(self, call: Call) -> bool:
        """Whether a call may be (a part of) an iteration by itself.

        Args:
            call: The call.

        Returns:
            True where it repeats and turns a stream into a stream.
        """
        return self.symbol(call) in self.repeated and self.streamy(call)

    def is_layered(self, call: Call) -> bool:
        """Whether a call has matrices and turns a stream into a stream: it has a role.

        Args:
            call: The call.

        Returns:
            True where it does.
        """
        return self.identity.weight[call.module] > 0 and self.streamy(call)

    def layers(self, call: Call) -> tuple[Call, ...]:
        """The layers that a call runs: the list in it, or itself; none for a bare matrix.

        Args:
            call: The call.

        Returns:
            The calls of the layers, in order.
        """
        if self.identity.is_leaf(call.module):
            return ()
        inner = self.inside(call)
        if inner is not None:
            return tuple(layer for unit in inner.calls for layer in inner.layers(unit))
        return tuple(chain(call, self)) or (call,)


def chain(call: Call, units: Units) -> list[Call]:
    """The longest list of like layers under a call that makes up most of it.

    Args:
        call: The call that may run a list of layers.
        units: Weights and streams.

    Returns:
        The calls of the layers in order; empty where there is no such list.
    """
    weight, is_leaf = units.identity.weight, units.identity.is_leaf
    for _ in range(DEEPEST):
        groups: dict[tuple[str, type], list[Call]] = defaultdict(list)
        for child in call.children:
            if weight[child.module] and not is_leaf(child.module):
                groups[units.identity.pattern(child.module)].append(child)
        heavy = sorted(groups.values(), key=lambda calls: -sum(weight[c.module] for c in calls))
        total = sum(weight[c.module] for c in call.children if not is_leaf(c.module))
        if not heavy or 2 * sum(weight[c.module] for c in heavy[0]) < total:
            return []
        if len(heavy[0]) > 1:
            fits = _are_numbered(heavy[0], alone=len(heavy) == 1)
            return heavy[0] if fits and all(_is_layer(c, units) for c in heavy[0]) else []
        only = heavy[0][0]
        numbered = only.module.rpartition(".")[2].isdigit()
        most = weight[only.module] >= ALL_BUT * weight[call.module]
        if numbered and _is_layer(only, units) and most:
            return [only]
        call = only
    return []


def _is_layer(call: Call, units: Units) -> bool:
    """Whether tokens go in and come out; some of them will do (mixture of recursions)."""
    streams = units.streams
    return any(map(streams.is_part, call.inputs)) and any(map(streams.is_part, call.outputs))


def _are_numbered(calls: Sequence[Call], alone: bool) -> bool:
    """Whether calls are of a list's members, or of `layer1`, `layer2`, … that stand alone."""
    names = [c.module.rpartition(".")[2] for c in calls]
    listed = all(name.isdigit() for name in names)
    counted = alone and all(name[-1:].isdigit() for name in names)
    return len(set(names)) == len(names) and (listed or counted)
