"""Units: the calls of a trace that a model is made of, at the level at which its loop shows."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from loopscope.models.loops.identity import Identity, Streams
from loopscope.models.loops.tracing import Call, Trace

BLOCK_SHARE, MATRIX_SHARE = 0.01, 0.1
"""What a repeated block, or a bare matrix, must make up of all matrix products to be a core."""

ALL_BUT = 0.9
"""What a list of one layer makes up of the stack around it, at least."""


@dataclass(eq=False)
class Units:
    """A traced forward pass as a flat sequence of calls.

    Attributes:
        trace: The traced forward pass.
        identity: Its modules.
        streams: What a stream looks like.
        repeated: Symbols of the units that repeat and weigh enough to be a core.
        calls: The units in order; lists and wrappers around a loop are opened, what does not
            repeat is one unit.
    """

    trace: Trace
    identity: Identity
    streams: Streams
    repeated: set[str]
    calls: list[Call]
    logits_width: int | None = None

    @classmethod
    def of(
        cls,
        trace: Trace,
        identity: Identity,
        streams: Streams,
        core: Collection[str] = (),
        logits_width: int | None = None,
    ) -> "Units":
        """Find the units of a whole model.

        Args:
            trace: The traced forward pass.
            identity: Its modules.
            streams: What a stream looks like.
            core: Symbols of the core where a specification gives them.
            logits_width: Width of the logits.

        Returns:
            The units.
        """
        units = cls(trace, identity, streams, set(core), [], logits_width)
        units.repeated = units.repeated or units._repeated([*trace.root.descendants()])
        units.calls = units.under(trace.root)
        return units

    def symbol(self, call: Call) -> str:
        """What makes two calls calls of the same thing."""
        return self.identity.symbol[call.module]

    def streamy(self, call: Call) -> bool:
        """Whether a call turns a stream into a stream."""
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
        """The units of a repeated call, where something repeats in it."""
        repeated = self._repeated([*call.descendants()])
        repeated = {s for s in repeated if not self.identity.is_leaf(s)}  # a layer may reuse one
        inner = Units(self.trace, self.identity, self.streams, repeated, [], self.logits_width)
        if not inner.repeated:
            return None
        inner.calls = inner.under(call)
        return inner

    def under(self, call: Call) -> list[Call]:
        """The units in one call, in order."""
        found: list[Call] = []
        for child in call.children:
            if self.is_core(child):
                found.append(child)
            elif any(self.is_core(one) for one in child.descendants()):
                found += self.under(child)
            elif self.identity.has_parameters(child.module):
                found.append(child)
        return found

    def is_head(self, call: Call) -> bool:
        """Whether a call turns another width into that of the logits."""
        width = self.logits_width
        given = [f.tensor.shape[-1] for f in call.inputs if f.tensor.ndim == 3]
        out = [f.tensor.shape[-1] for f in call.outputs if f.tensor.ndim == 3]
        return width in out and bool(given) and width not in given

    def is_core(self, call: Call) -> bool:
        """Whether a call may be (a part of) an iteration by itself."""
        return self.symbol(call) in self.repeated and self.streamy(call)

    def is_layered(self, call: Call) -> bool:
        """Whether a call has matrices and turns a stream into a stream: it has a role."""
        return self.identity.weight[call.module] > 0 and self.streamy(call)

    def layers(self, call: Call) -> tuple[Call, ...]:
        """The layers that a call runs: the list in it, or itself; none for a bare matrix."""
        if self.identity.is_leaf(call.module):
            return ()
        inner = self.inside(call)
        if inner is not None:
            return tuple(layer for one in inner.calls for layer in inner.layers(one))
        return tuple(chain(call, self)) or (call,)


def chain(call: Call, units: Units) -> list[Call]:
    """The longest list of like layers under a call that makes up most of it.

    Args:
        call: The call that may run a list of layers.
        units: Weights and streams.

    Returns:
        The calls of the layers in order; empty where there is no such list.
    """
    weigh = units.identity.weight

    def is_layer(call: Call) -> bool:  # some of the tokens will do (mixture of recursions)
        return any(map(units.streams.is_part, call.inputs)) and any(
            map(units.streams.is_part, call.outputs)
        )

    for _ in range(12):
        groups: dict[tuple[str, type], list[Call]] = defaultdict(list)
        for child in call.children:
            if weigh[child.module] and not units.identity.is_leaf(child.module):
                groups[units.identity.pattern(child.module)].append(child)
        heavy = sorted(groups.values(), key=lambda calls: -sum(weigh[c.module] for c in calls))
        leaf = units.identity.is_leaf
        whole = sum(weigh[c.module] for c in call.children if not leaf(c.module))
        if not heavy or 2 * sum(weigh[c.module] for c in heavy[0]) < whole:
            return []
        if len(heavy[0]) > 1:
            names = [c.module.rpartition(".")[2] for c in heavy[0]]
            listed = all(name.isdigit() for name in names)
            alone = len(heavy) == 1 and all(name[-1:].isdigit() for name in names)
            fits = len(set(names)) == len(names) and (listed or alone)
            return heavy[0] if fits and all(map(is_layer, heavy[0])) else []
        only = heavy[0][0]
        listed = only.module.rpartition(".")[2].isdigit()
        if listed and is_layer(only) and weigh[only.module] >= ALL_BUT * weigh[call.module]:
            return [only]
        call = only
    return []
